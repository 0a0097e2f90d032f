"""examples/grpo from nothing, a few small steps, and on from its checkpoint."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

TRAIN = Path(__file__).parents[2] / "examples" / "grpo" / "train.py"
SMALL = (
    "--warm-steps 12 --hidden-size 128 --groups 3 --group-size 4 --eval-problems 4"
    " --eval-every 1 --threads 1"
).split()


def train(out: Path, *more: str) -> list[dict[str, str]]:
    command = [sys.executable, str(TRAIN), "--out", str(out), *SMALL, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_it_trains_and_goes_on_from_its_checkpoint(tmp_path):
    rows = train(tmp_path, "--iterations", "2")
    assert [row["iteration"] for row in rows] == ["0", "1", "2"]
    assert (tmp_path / "curve.png").stat().st_size > 1000
    more = train(tmp_path, "--iterations", "3", "--speculation", "dgds", "--dynamic")
    assert [row["iteration"] for row in more] == ["0", "1", "2", "3"]
    assert more[:3] == rows
    assert int(more[3]["num_responses"]) > 12, "what taught nothing was replaced"
    for row in rows[1:]:
        assert float(row["logprob_off_max"]) < 1e-3, "engine and trainer agree"
        assert float(row["ratio_mean"]) == pytest.approx(1.0, abs=1e-3)
