"""What an engine tells Prometheus is what its rollouts' reports say, in all."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from pathlib import Path

import pytest

import aseer
from aseer.cli.main import main
from aseer.runtime.metrics import METRICS
from tests.integration.sims import config_of, groups_of

parser = pytest.importorskip("prometheus_client.parser")
PAGE = Path(aseer.__file__).parents[1] / "docs" / "troubleshooting.md"


def scraped(url: str) -> dict[str, dict[str, float]]:
    """By sample's name, by label's value."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            label = next(iter(sample.labels.values()), "")
            found.setdefault(sample.name, {})[label] = sample.value
    return found


async def test_figures_are_those_of_all_rollouts_and_the_one_in_progress():
    config = config_of(metrics_address="127.0.0.1:0")
    async with aseer.Engine(config) as engine:
        url = engine.metrics_url
        assert url is not None
        assert url.startswith("http://127.0.0.1:")
        before = await asyncio.to_thread(scraped, url)
        assert before["aseer_info"] == {aseer.__version__: 1}
        assert before["aseer_instances"] == {"": 2}
        assert before["aseer_node_instances"] == {"local": 2}
        assert before["aseer_output_tokens_total"] == {"": 0}
        reports = []
        for _ in range(2):
            rollout = engine.rollout(groups_of(3))
            responses = [r async for r in rollout]
            assert len(responses) == 12
            reports.append(rollout.report)
        found = await asyncio.to_thread(scraped, url)
        num_tokens = sum(r.num_output_tokens for r in reports)
        assert found["aseer_output_tokens_total"] == {"": num_tokens}
        assert found["aseer_chunks_total"] == {"": sum(r.num_chunks for r in reports)}
        assert sum(found["aseer_responses_total"].values()) == 24
        assert found["aseer_rollouts_total"] == {"": 2}
        assert found["aseer_unfinished_requests"] == {"": 0}
        long = {"ignore_eos": True, "max_tokens": 2000}
        async with engine.rollout(groups_of(3, **long)):
            await asyncio.sleep(0.5)
            found = await asyncio.to_thread(scraped, url)
            assert found["aseer_unfinished_requests"] == {"": 12}
            assert found["aseer_output_tokens_total"][""] > num_tokens
            assert sum(found["aseer_instance_running"].values()) > 0
            assert sorted(found["aseer_instance_kv_used_ratio"]) == ["0", "1"]
        found = await asyncio.to_thread(scraped, url)
        assert found["aseer_responses_total"]["aborted"] == 12
        assert found["aseer_rollouts_total"] == {"": 3}


async def test_without_an_address_nothing_listens(engine):
    assert engine.metrics_url is None
    assert not any("http" in t.name.lower() for t in threading.enumerate())


async def test_an_address_that_is_taken_is_refused_by_name():
    async with aseer.Engine(config_of(metrics_address="127.0.0.1:0")) as engine:
        assert engine.metrics_url is not None
        taken = engine.metrics_url.removeprefix("http://").partition("/")[0]
        with pytest.raises(aseer.ConfigError, match="cannot be listened at"):
            async with aseer.Engine(config_of(metrics_address=taken)):
                pass


@pytest.mark.parametrize("address", ["9000", 9000, "host:", "host:x", ":1", "a:70000"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(aseer.ConfigError, match=r"metrics_address=.*127\.0\.0\.1:9464"):
        config_of(metrics_address=address)


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("aseer.node.metrics.find_spec", lambda _: None)
    with pytest.raises(aseer.ConfigError, match=r"pip install 'aseer\[metrics\]'"):
        aseer.Engine(config_of(metrics_address="127.0.0.1:0"))


def test_the_page_lists_every_name():
    rows = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| `aseer_")
    ]
    listed = {row.split("`")[1] for row in rows}
    told = {
        name + ("_total" if kind == "counter" else "") for name, kind, *_ in METRICS
    }
    assert listed == told | {"aseer_info"}


async def test_status_shows_an_engines_instances_and_what_runs(tmp_path, capsys):
    file = tmp_path / "controller"
    config = config_of(
        metrics_address="127.0.0.1:0",
        listen="tcp://127.0.0.1:*",
        controller_file=file,
    )
    long = {"ignore_eos": True, "max_tokens": 2000}
    async with aseer.Engine(config) as engine, engine.rollout(groups_of(3, **long)):
        await asyncio.sleep(0.3)
        assert engine.metrics_url is not None
        for where in (["--controller-file", str(file)], [engine.metrics_url]):
            assert await asyncio.to_thread(main, ["status", *where]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0] == "instances: 2 (2 on local)"
            assert lines[1] == "weights: version 0"
            assert lines[2].startswith("rollout: 12 requests unfinished")
            assert lines[4].split()[:2] == ["instance", "running"]
            assert [line.split()[0] for line in lines[5:]] == ["0", "1"]


def test_status_of_nothing_says_so(tmp_path, capsys):
    assert main(["status", "127.0.0.1:1"]) == 1
    told = capsys.readouterr().err
    assert "no engine answers at http://127.0.0.1:1/metrics" in told
    file = tmp_path / "controller"
    assert main(["status", "--controller-file", str(file)]) == 1
    assert "is no controller's file" in capsys.readouterr().err
    file.write_text('{"address": "tcp://head:5557"}')
    assert main(["status", "--controller-file", str(file)]) == 1
    assert "give EngineConfig one" in capsys.readouterr().err
