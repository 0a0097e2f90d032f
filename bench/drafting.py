"""What the drafting benchmarks share: traces, and the library compared with."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aseer.data import trace
from aseer.data.trace import TraceGroup

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from types import ModuleType

VOCABULARY = 4096


def read_traces(path: Path | None, *, smoke: bool) -> list[TraceGroup]:
    """Read a trace file; without one, make up a small trace for a smoke run."""
    if path is None:
        if not smoke:
            msg = "--traces is needed, except with --smoke"
            raise SystemExit(msg)
        return synthetic_traces(num_groups=2, num_responses=8, num_tokens=60, seed=0)
    groups = trace.load(path).groups
    return list(groups[:2] if smoke else groups)


def synthetic_traces(
    *, num_groups: int, num_responses: int, num_tokens: int, seed: int
) -> list[TraceGroup]:
    """Make groups whose responses are noisy walks over a few phrases they share."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(num_groups):
        phrases = rng.zipf(1.4, (40, 12)) % VOCABULARY
        responses = []
        for _ in range(num_responses):
            picks = rng.zipf(1.2, num_tokens // 12 + 1) % len(phrases)
            text = phrases[picks].reshape(-1)[:num_tokens]
            noise = rng.random(len(text)) < 0.1
            text = np.where(noise, rng.integers(0, VOCABULARY, len(text)), text)
            responses.append(text.astype(np.int32))
        prompt = phrases[:3].reshape(-1).astype(np.int32)
        groups.append(TraceGroup(prompt, responses))
    return groups


CANNOT_RUN = 77  # exit status: something is not installed (automake's for a skip)


def import_arctic() -> ModuleType:
    """Import arctic-inference's suffix tree, or exit saying how to install it."""
    try:
        return importlib.import_module("arctic_inference.suffix_decoding._C")
    except ImportError as error:
        print(
            "This benchmark compares with arctic-inference, which is not installed:\n"
            "  pip install --no-deps arctic-inference==0.3.0\n"
            "(its suffix module builds from source in about 3 minutes).",
            file=sys.stderr,
        )
        raise SystemExit(CANNOT_RUN) from error


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options that both benchmarks take."""
    parser.add_argument(
        "--traces", type=Path, help="a recorded rollout (see `aseer record`)"
    )
    parser.add_argument("--smoke", action="store_true", help="seconds, not minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FILE", help="write the result there too")


def settings_of(args: Namespace) -> dict[str, str]:
    """What a run was asked for; files by their names alone."""
    return {
        key: value.name if isinstance(value, Path) else str(value)
        for key, value in vars(args).items()
        if key != "save"
    }
