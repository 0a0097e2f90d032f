"""A trainer with real engines dies, and its rollout ends as if it had not (I11)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import aseer
from tests.e2e.tiny import by_request, same, tiny_config, tiny_model, undivided

TRAINER = """
import sys
import aseer
from tests.e2e.test_journal import groups
from tests.e2e.tiny import tiny_config

if __name__ == "__main__":
    model, journals = sys.argv[1:]
    config = tiny_config(
        num_instances=1, model=model, chunk_size=64, journal_dir=journals
    )
    with aseer.Engine(config) as engine:
        for response in engine.rollout_sync(groups(), journal="step-0"):
            print(response.request_id, flush=True)
        print("it was not killed", flush=True)
"""


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
    config = tiny_config(num_instances=1, chunk_size=64, journal_dir=journals)
    with aseer.Engine(config) as engine:
        rollout = engine.rollout_sync(groups(), journal="step-0")
        found = by_request(list(rollout))
        assert {name for name in seen if found[name].replayed} == set(seen)
        report = rollout.report
        assert 9 <= report.num_replayed < 24
        assert report.num_resumed_tokens > 0
        num_all = sum(len(r.token_ids) for r in found.values())
        assert report.num_output_tokens < num_all - report.num_resumed_tokens
        same(found, undivided(engine, groups()))
