"""`aseer simulate`: options become a cluster and a workload; every arm is told of."""

from __future__ import annotations

import json

import pytest

from aseer.cli.main import main
from aseer.sim import Cluster, Workload, simulate
from aseer.sim.fit import LinearSteps

SMALL = ["--groups=6", "--n=4", "--instances=2", "--mean=300", "--max-tokens=2000"]


def simulated(capsys, *options):
    assert main(["simulate", *SMALL, *options]) == 0
    return capsys.readouterr().out


def test_the_table_has_every_arm(capsys):
    out = simulated(capsys)
    for arm in ("groups in turn", "divided", "+ grouped drafts", "oracle"):
        assert arm in out
    assert "24 responses" in out


def test_json_has_the_figures_of_every_arm_and_chunk_size(capsys):
    result = json.loads(simulated(capsys, "--json", "--chunk-size=64,128"))
    arms = {(row["arm"], row["chunk_size"]): row for row in result["arms"]}
    assert len(arms) == 8
    assert arms["groups in turn", 0]["speedup"] == 1.0
    assert arms["+ grouped drafts", 128]["num_preemptions"] == 0


def test_own_lengths_and_an_own_model(capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('[{"num_prompt_tokens": 9, "lengths": [30, 40]}]')
    shape = {
        "name": "mine",
        "weight_bytes": 1e9,
        "active_params": 5e8,
        "kv_bytes_per_token": 1e4,
    }
    out = simulated(capsys, f"--workload={path}", f"--model-shape={json.dumps(shape)}")
    assert "mine: 2 responses, 70 tokens" in out
    assert "2 instances of mine" in out


def test_a_report_gives_the_engines_and_the_lengths(capsys, tmp_path):
    lengths = [[300, 400], [900, 800]]
    cluster = Cluster(
        num_instances=2,
        step_time=LinearSteps(base_s=0.01, token_s=1e-5, kv_token_s=1e-7),
        num_kv_tokens=5000,
    )
    work = Workload(name="w", lengths=lengths, num_prompt_tokens=[9, 9], max_tokens=900)
    report = simulate(work, cluster, chunk_size=16, policy="fcfs")
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.to_dict()))
    assert main(["simulate", f"--fit={path}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "report: 4 responses, 2,400 tokens" in out
    assert "2 instances whose steps take 10 ms" in out
    assert ": 100% of the rollout fits at once" in out
    assert "That rollout took" in out


def test_a_plot_is_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    simulated(capsys, f"--plot={tmp_path / 'new' / 'c.png'}")
    assert (tmp_path / "new" / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "option",
    [
        "--instances=0",
        "--groups=-1",
        "--n=1.5",
        "--pool-gb-per-s=0",
        "--memory-share=x",
    ],
)
def test_numbers_are_above_0(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        main(["simulate", *SMALL, option])
    assert "above 0" in capsys.readouterr().err


def test_an_empty_workload_is_explained(capsys, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text("[]")
    assert main(["simulate", f"--workload={path}"]) == 1
    assert "'empty' has no group" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=kimi-k2"], "does not fit on 1 H100; give --gpus-per-instance"),
        (["--chunk-size=0"], "--chunk-size='0' is not allowed"),
        (["--chunk-size=a"], "--chunk-size='a' is not allowed"),
        (["--model-shape={}"], "--model-shape is not a ModelShape"),
        (["--workload=/nonexistent"], "is not a workload"),
        (["--mean=5000"], "must be above 0 and below 2000"),
    ],
)
def test_what_cannot_be_is_explained(capsys, options, message):
    assert main(["simulate", *SMALL, *options]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
