"""A trainer with real engines dies, and its rollout ends as if it had not (I11)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import aseer
from tests.e2e.tiny import by_request, same, tiny_config, tiny_model, undivided

TRAINER = """
import sys
import aseer
from tests.e2e.test_journal import config_of, groups

if __name__ == "__main__":
    model, journals = sys.argv[1:]
    config = config_of(journals, model=model)
    with aseer.Engine(config) as engine:
        for response in engine.rollout_sync(groups(), journal="step-0"):
            print(response.request_id, flush=True)
        print("it was not killed", flush=True)
"""


def config_of(journals: Path | str, **settings: Any) -> aseer.EngineConfig:
    """One engine on one core: how many threads share a sum decides its last bits."""
    return tiny_config(
        num_instances=1,
        chunk_size=64,
        journal_dir=journals,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0"},
        **settings,
    )


def groups() -> list[aseer.Group]:
    """Of very different lengths, so that some are finished early."""
    sampling = {"temperature": 0.0, "ignore_eos": True}
    return [
        aseer.Group(
            [5, 6, 7 + i],
            n=2,
            sampling=sampling | {"max_tokens": 40 + 160 * (i % 6)},
            group_id=f"g{i}",
        )
        for i in range(12)
    ]


@pytest.mark.slow
def test_a_killed_trainer_ends_with_what_it_would_have_had(tmp_path):
    script, journals = tmp_path / "train.py", tmp_path / "journals"
    script.write_text(TRAINER)
    with subprocess.Popen(
        [sys.executable, str(script), str(tiny_model()), str(journals)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(aseer.__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(Path(aseer.__file__).parents[1])},
    ) as trainer:
        assert trainer.stdout is not None
        seen = [trainer.stdout.readline().strip() for _ in range(9)]
        trainer.kill()
    assert all("/" in name for name in seen), seen
    with aseer.Engine(config_of(journals)) as engine:
        rollout = engine.rollout_sync(groups(), journal="step-0")
        found = by_request(list(rollout))
        assert {name for name in seen if found[name].replayed} == set(seen)
        report = rollout.report
        assert 9 <= report.num_replayed < 24
        assert report.num_resumed_tokens > 0
        num_all = sum(len(r.token_ids) for r in found.values())
        assert report.num_output_tokens < num_all - report.num_resumed_tokens
        expected = undivided(engine, groups())
        had = {name for name, response in found.items() if response.replayed}
        same({n: found[n] for n in had}, {n: expected[n] for n in had})
        # The KV of those that went on was computed anew, in one step.
        rest = expected.keys() - had
        same({n: found[n] for n in rest}, {n: expected[n] for n in rest}, rounding=1e-5)
