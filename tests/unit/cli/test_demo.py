"""The demo around a fake engine: what it asks for, prints and writes."""

from __future__ import annotations

import io
import json
import re
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from aseer import data
from aseer.cli import demo
from aseer.cli.main import build_parser, main
from aseer.cli.summary import is_right, print_summary, share_right
from aseer.errors import ConfigError, RolloutError
from aseer.groups import Group
from aseer.report import (
    Completion,
    InstanceReport,
    KvReport,
    Progress,
    RolloutReport,
    SpeculationReport,
)
from aseer.types import RequestMetrics, Response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from aseer.config import EngineConfig

    Open = Callable[[EngineConfig], AbstractAsyncContextManager["FakeEngine"]]


def response(group: Group, index: int) -> Response:
    """Of an even index, the right answer."""
    right = index % 2 == 0
    return Response(
        group_id=group.group_id or "",
        index=index,
        prompt_token_ids=[1, 2],
        token_ids=[3, 4, 5],
        logprobs=[-0.5, -0.25, 0.0],
        text=f"It is\n[bold]{group.metadata.answer}." if right else "I do not know.",
        finish_reason="stop",
        stop_reason=2,
        weight_version=0,
        metrics=RequestMetrics(
            queue_s=0.0,
            run_s=1.0,
            finished_at_s=float(index),
            num_chunks=2,
            num_migrations=1,
            num_retries=0,
            instances=[0, 1],
            num_cached_tokens=0,
            num_recomputed_tokens=3,
        ),
        metadata=group.metadata,
    )


class FakeRollout:
    """Finishes the last member of each group first."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._responses = [response(g, i) for g in groups for i in reversed(range(g.n))]

    async def __aiter__(self) -> AsyncIterator[Response]:
        for each in self._responses:
            yield each

    def progress(self) -> Progress | None:
        return None

    @property
    def report(self) -> RolloutReport:
        count = len(self._responses)
        return RolloutReport(
            policy="context-aware",
            chunk_size=128,
            num_groups=len({r.group_id for r in self._responses}),
            num_responses=count,
            num_prompt_tokens=2 * count,
            num_output_tokens=3 * count,
            wall_s=4.0,
            throughput_tok_s=0.75 * count,
            tail_s=1.0,
            num_chunks=2 * count,
            num_migrations=count,
            num_preemptions=0,
            num_recomputed_tokens=3 * count,
            num_cached_tokens=0,
            num_retries=0,
            finish_reasons={"stop": count},
            mean_output_tokens=3.0,
            max_output_tokens=3,
            idle_fraction=0.1,
            weight_version=0,
            instances=[
                InstanceReport(
                    instance_id=0,
                    num_output_tokens=3 * count,
                    num_chunks=2 * count,
                    num_preemptions=0,
                    num_restarts=0,
                    busy_s=3.0,
                    num_kv_blocks=100,
                    block_size=32,
                    kv_tokens=3200,
                )
            ],
            completions=[
                Completion(
                    t_s=float(r.index),
                    group_id=r.group_id,
                    index=r.index,
                    instance_id=1,
                    num_output_tokens=3,
                    finish_reason="stop",
                )
                for r in self._responses
            ],
        )


class FakeEngine:
    def rollout(self, groups: Sequence[Group]) -> FakeRollout:
        return FakeRollout(groups)


class Opener:
    """Makes fake engines and remembers what was asked for."""

    def __init__(self) -> None:
        self.configs: list[EngineConfig] = []
        self.num_closed = 0

    @asynccontextmanager
    async def __call__(self, config: EngineConfig) -> AsyncIterator[FakeEngine]:
        self.configs.append(config)
        try:
            yield FakeEngine()
        finally:
            self.num_closed += 1


@pytest.fixture
def opener() -> Opener:
    return Opener()


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture has its own tests, and takes a second."""

    def timeline(report: RolloutReport, path: Path) -> Path:
        path.write_bytes(b"\x89PNG")
        return path

    monkeypatch.setattr(demo.plot, "timeline", timeline)


def run(opener: Open, out: Path, *options: str) -> int:
    argv = ["demo", "--model", "m", "--out", str(out), *options]
    return demo.run(build_parser().parse_args(argv), open_engine=opener)


def written(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text("utf-8"))


def test_report_json_has_the_reports_fields_at_its_top(
    opener: Opener, tmp_path: Path
) -> None:
    assert run(opener, tmp_path) == 0
    found = written(tmp_path)
    assert {field.name for field in fields(RolloutReport)} <= found.keys()
    assert found["num_groups"] == 8
    assert found["num_responses"] == 64
    assert found["num_output_tokens"] == 192
    assert found["num_migrations"] == 64
    assert found["tail_s"] == 1.0


def test_report_json_has_every_field_of_every_response(
    opener: Opener, tmp_path: Path
) -> None:
    run(opener, tmp_path, "--num-prompts", "2", "--n", "3")
    responses = written(tmp_path)["responses"]
    assert len(responses) == 6
    for each in responses:
        assert each.keys() == {field.name for field in fields(Response)}
        assert each["metrics"].keys() == {f.name for f in fields(RequestMetrics)}
        assert each["logprobs"] == [-0.5, -0.25, 0.0]
    assert responses[0]["metadata"]["id"] == data.load_prompts()[0].id


def test_report_json_says_what_made_it(opener: Opener, tmp_path: Path) -> None:
    run(opener, tmp_path, "--seed", "5", "--policy", "fcfs", "--chunk-size", "0")
    found = written(tmp_path)
    config = found["config"]
    assert config["model"] == "m"
    assert config["policy"] == "fcfs"
    assert config["chunk_size"] == 0
    assert config["n"] == 8
    assert config["sampling"]["seed"] == 5
    assert list(found["stages_s"]) == [
        "start_engines",
        "encode_prompts",
        "rollout",
        "close",
    ]
    assert found["versions"].keys() == {"aseer", "vllm", "python"}


def test_the_options_reach_the_engine(opener: Opener, tmp_path: Path) -> None:
    run(
        opener,
        tmp_path,
        *("--instances", "3", "--dtype", "float32", "--max-num-seqs", "4"),
        *("--max-tokens", "99", "--temperature", "0", "--device", "sim"),
    )
    (config,) = opener.configs
    assert (config.num_instances, config.dtype, config.max_num_seqs) == (
        3,
        "float32",
        4,
    )
    assert (config.sampling.max_tokens, config.sampling.temperature) == (99, 0.0)
    assert config.device == "sim"
    assert config.max_model_len == 2048
    assert config.log_dir == tmp_path / "logs"


def test_json_prints_the_report_and_nothing_else(
    opener: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(opener, tmp_path, "--json")
    out, err = capsys.readouterr()
    assert json.loads(out) == written(tmp_path)
    assert err == ""


def test_each_group_is_shown_once_with_its_score(
    opener: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(opener, tmp_path, "--num-prompts", "2", "--n", "3")
    out = capsys.readouterr().out
    assert out.count("capital-france  What is the capital of France?") == 1
    # The sample is the first member; brackets in a response are not markup.
    assert "It is [bold]Paris." in out
    assert out.count("right (answer: Paris), 3 tokens, stop; the group: 2/3 right") == 1
    assert "4/6 right" in out


def test_the_files_are_named_at_the_end(
    opener: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(opener, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"wrote {tmp_path / 'report.json'}",
        f"wrote {tmp_path / 'timeline.png'}",
    ]


def test_without_matplotlib_the_report_is_still_written(
    opener: Opener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def timeline(*_: object) -> Path:
        raise ConfigError("plotting needs matplotlib")

    monkeypatch.setattr(demo.plot, "timeline", timeline)
    assert run(opener, tmp_path) == 0
    assert "no timeline.png: plotting needs matplotlib" in capsys.readouterr().out
    assert written(tmp_path)["num_responses"] == 64


def test_a_failing_rollout_closes_the_engines(
    opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rollout(self: FakeEngine, groups: Sequence[Group]) -> FakeRollout:
        raise RolloutError("3 requests failed")

    monkeypatch.setattr(FakeEngine, "rollout", rollout)
    with pytest.raises(RolloutError, match="3 requests failed"):
        run(opener, tmp_path)
    assert opener.num_closed == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["--chunk-size", "-1"], "chunk_size"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_a_wrong_option_is_told_before_anything_starts(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *options]) == 1
    err = capsys.readouterr().err
    assert err.startswith("aseer: error: ")
    assert message in err
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_a_prompt_file_is_taken_whole_unless_limited(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt_token_ids": [1, i]}) for i in range(12)]
    path.write_text("\n".join(lines))
    parse = build_parser().parse_args
    whole = demo.make_groups(parse(["demo", "--prompts", str(path)]))
    assert [group.prompt for group in whole] == [(1, i) for i in range(12)]
    some = demo.make_groups(
        parse(["demo", "--prompts", str(path), "--num-prompts", "3"])
    )
    assert [group.group_id for group in some] == ["line-1", "line-2", "line-3"]


def test_a_prompt_without_an_answer_has_no_score() -> None:
    record = data.PromptRecord(id="a", prompt="Hello")
    (group,) = [demo.Group(prompt="Hello", group_id="a", metadata=record)]
    given = response(group, 1)
    assert is_right(given) is None
    assert share_right([given]) == ""


def summary_of(report: RolloutReport) -> str:
    """Printed, its words separated by single spaces and its frames left out."""
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(console, report, [], {"rollout": 4.0})
    text = re.sub(r"[^\w%(),.:;'-]+", " ", console.export_text())
    return text.partition("what each idea did")[2].partition("instances")[0]


def test_the_summary_says_what_each_idea_did() -> None:
    group = Group("?", n=8, group_id="g", metadata=data.load_prompts()[0])
    report = FakeRollout([group]).report
    counts = dict.fromkeys((f.name for f in fields(KvReport)), 0)
    kv = KvReport(**counts | {"num_moves_found": 6, "num_moves_recomputed": 2})
    drafts = SpeculationReport(
        acceptance_length=1.5,
        num_drafts=8,
        drafted=[8, 7],
        accepted=[3, 1],
        drafting_share=0.02,
        drafting_share_p99=0.1,
        drafting_share_worst=0.2,
    )
    found = summary_of(replace(report, kv=kv, speculation=drafts))
    assert "divided rollout 16 chunks at most 128 tokens each" in found
    assert "8 moves to another engine: 6 found their KV there, 2 did not" in found
    assert "scheduling (context-aware) tail 1.0 s for the last tenth" in found
    assert "the responses, 25% of the time" in found
    assert "grouped drafts 4 tokens accepted of 15 drafted, in 8 drafts" in found
    assert "4 steps saved 17% of all tokens; drafting took 2.0%" in found


def test_the_summary_claims_nothing_of_what_was_off() -> None:
    group = Group("?", n=2, group_id="g", metadata=data.load_prompts()[0])
    report = FakeRollout([group]).report
    found = summary_of(replace(report, chunk_size=0, num_migrations=0))
    assert "4 chunks undivided 0 moves no chunk began on another engine" in found
    assert "grouped drafts off no engine drafts" in found
    assert "saved" not in found
    assert "there is no KV pool" in summary_of(report)


def test_the_demo_drafts_unless_told_otherwise(opener: Opener, tmp_path: Path) -> None:
    run(opener, tmp_path)
    run(opener, tmp_path, "--speculation", "off")
    methods = [config.speculation.method for config in opener.configs]
    assert methods == ["dgds", "off"]
