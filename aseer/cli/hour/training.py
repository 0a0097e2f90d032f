"""Step 9: the replay benchmark and a step of GRPO, which come with a checkout.

Each is a program of its own; what it prints is in a log beside the report.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aseer.cli.findings import Finding, fail, ok
from aseer.cli.hour.steps import REPORT_IT
from aseer.errors import AseerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from aseer.cli.hour.site import Site

BENCH, TRAIN = "bench/bench_rollout_vllm.py", "examples/grpo/train.py"
_TIMEOUT_S = 3600.0
# In float32 with the same weights; by more than this the two are different programs.
LOGPROBS_OFF = 1e-3
RATIO_OFF = 1e-3


class ProgramError(AseerError):
    """A program failed; the text ends as its output does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What the benchmark measured: medians, by arm.

    Attributes:
        over_base: throughput over that of the first arm.
    """

    command: str
    tokens_per_s: dict[str, float]
    over_base: dict[str, float]


def replay_options(site: Site) -> list[str]:
    """How the benchmark is run here."""
    if not site.on_gpu:
        return ["--smoke"]
    engines = ["--engines", str(site.num_gpus), "--max-num-seqs", "256"]
    return ["--quick", "--model", "qwen3-8b", *engines, "--restart"]


def replayed(site: Site) -> Replayed:
    """Run the benchmark; every token that it replays is checked there."""
    saved = site.scratch / "replay.json"
    options = replay_options(site)
    run_program(site, BENCH, [*options, "--save", str(saved)])
    arms = json.loads(saved.read_text())["arms"]
    return Replayed(
        command=" ".join(["python", BENCH, *options]),
        tokens_per_s={n: arm["throughput_tok_s"]["median"] for n, arm in arms.items()},
        over_base={n: arm["over_base"]["median"] for n, arm in arms.items()},
    )


def judge_replayed(found: Replayed) -> Finding:
    """Recorded; the benchmark itself fails where a token differs."""
    arms = ", ".join(f"{arm} {gain:.2f}" for arm, gain in found.over_base.items())
    return ok(f"throughput over that of the first arm: {arms} (`{found.command}`)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A step of GRPO.

    Attributes:
        logprob_off_max: by how much the trainer's logprobs differ from the engine's.
        ratio_mean: of the importance ratios before the first gradient step.
    """

    command: str
    num_responses: int
    logprob_off_max: float
    ratio_mean: float


def train_options(site: Site) -> list[str]:
    """How the example is run here; on GPUs its engines have others, if there are."""
    if site.on_gpu:
        engines = site.gpus[site.num_gpus // 2 :][:2]
        engines = engines if len(engines) == 2 else site.gpus[:2]
        where = ["--device", "cuda:0", "--gpus", ",".join(engines)]
        return ["--iterations", "1", "--warm-steps", "200", *where]
    small = "--warm-steps 12 --hidden-size 128 --groups 3 --group-size 4"
    return [
        "--iterations",
        "1",
        *small.split(),
        *"--eval-problems 4 --threads 1".split(),
    ]


def trained(site: Site) -> Trained:
    """Warm a small policy up, and train it for one step."""
    out, options = site.scratch / "grpo", train_options(site)
    run_program(site, TRAIN, [*options, "--out", str(out)])
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return trained_of(" ".join(["python", TRAIN, *options]), rows)


def trained_of(command: str, rows: Sequence[Mapping[str, str]]) -> Trained:
    """The figures of the last step in a table of the example's.

    Raises:
        ProgramError: there is none.
    """
    if not rows or not rows[-1].get("ratio_mean"):
        raise ProgramError(f"{command}: it made no step of training")
    last = rows[-1]
    return Trained(
        command=command,
        num_responses=int(float(last["num_responses"])),
        logprob_off_max=float(last["logprob_off_max"]),
        ratio_mean=float(last["ratio_mean"]),
    )


def judge_trained(found: Trained) -> Finding:
    """Trainer and engine compute the same logprobs with the same weights."""
    detail = (
        f"{found.num_responses} responses; logprobs of trainer and engine differ by "
        f"{found.logprob_off_max:.1e} at most, importance ratios are "
        f"{found.ratio_mean:.4f} on average (`{found.command}`)"
    )
    # So that NaN fails, too.
    agree = found.logprob_off_max < LOGPROBS_OFF
    if not (agree and abs(found.ratio_mean - 1) < RATIO_OFF):
        return fail(detail, REPORT_IT)
    return ok(detail)


def obstacle(site: Site, program: str, options: Sequence[str], *needs: str) -> str:
    """Why a program of the checkout is skipped; "" = it can run.

    Args:
        needs: modules that it imports, and aseer itself does not need.
    """
    if site.checkout is None or not (site.checkout / program).is_file():
        command = " ".join(["python", program, *options])
        return f"{program} is not here; in a checkout of aseer run `{command}`"
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"{program} needs {', '.join(missing)}" if missing else ""


def run_program(site: Site, program: str, options: Sequence[str]) -> None:
    """Run a program of the checkout to its end.

    Raises:
        ProgramError: it failed, or took more than an hour.
    """
    assert site.checkout is not None  # or the step is skipped
    log = site.logs / f"{_stem(program)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(site.checkout / program), *options]
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "cwd": site.scratch}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=_TIMEOUT_S,
                check=False,
                **settings,
            )
        except subprocess.TimeoutExpired:
            raise ProgramError(f"{program}: no end in {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise ProgramError(
            f"{program}: exit status {done.returncode}; its output ends with: "
            f"{_end(log)}"
        )


def _stem(program: str) -> str:
    return program.rpartition("/")[2].removesuffix(".py")


def _end(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
