"""`aseer record`: a rollout whose prompts and responses are kept, to be replayed.

The rollout is the demo's; what is written is a trace (`aseer.data.trace`), with its
checksum. The same command makes the same trace again, up to rounding.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from aseer.cli import demo
from aseer.cli.summary import Stages
from aseer.compat.versions import installed_vllm
from aseer.data import trace
from aseer.data.trace import Trace, TraceGroup
from aseer.errors import ConfigError
from aseer.runtime.engine import Engine
from aseer.version import __version__

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from aseer.groups import Group
    from aseer.types import Response

_NUM_PROMPTS = 64
_MAX_PROMPT_TOKENS = 1024


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add `record` and its options."""
    parser = subparsers.add_parser(
        "record",
        parents=[common],
        help="roll out and keep the token ids, for benchmarks to replay",
        description="Roll out prompts and write their responses' token ids to a file.",
    )
    demo.add_work_options(parser.add_argument_group("work"), str(_NUM_PROMPTS))
    demo.add_engine_options(parser.add_argument_group("engines"))
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help='gzipped if it ends in ".gz" (default: runs/trace-t<temperature>.json.gz);'
        " the engines' logs go to FILE.logs",
    )
    parser.set_defaults(
        run=run,
        num_prompts=_NUM_PROMPTS,
        temperature=0.7,  # a small model writes noise at 1
        max_tokens=2048,
        seed=0,
        max_num_seqs=32,
        chunk_size=256,
        speculation="off",  # seeded samples repeat without drafts only
    )


def run(args: argparse.Namespace, *, open_engine: demo.OpenEngine = Engine) -> int:
    """Record and return the exit code.

    Raises:
        AseerError: a wrong option, the model cannot be had, the engines do not start,
            or a request failed.
    """
    console = Console(highlight=False)
    out = args.out or default_path(args.temperature)
    recorded = record(args, console, open_engine)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        trace.save(recorded, out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error}") from error
    console.print(describe(recorded), markup=False)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)
    return 0


def default_path(temperature: float) -> Path:
    """Where a recording goes unless told otherwise."""
    return Path("runs") / f"trace-t{temperature:g}.json.gz"


def record(
    args: argparse.Namespace, console: Console, open_engine: demo.OpenEngine = Engine
) -> Trace:
    """The rollout that the options ask for, as a trace."""
    stages = Stages(console)
    groups = demo.make_groups(args)
    out = args.out or default_path(args.temperature)
    config = replace(
        demo.make_config(args, log_dir=out.with_name(f"{out.name}.logs")),
        max_model_len=args.max_tokens + _MAX_PROMPT_TOKENS,
    )
    if args.model is None:
        with stages("prepare", "preparing SmolLM2-135M-Instruct"):
            config = replace(config, model=str(demo.prepare_model(console, args)))
    outcome = asyncio.run(demo.roll_out(config, groups, stages, console, open_engine))
    vllm = installed_vllm()
    settings = {
        "model": Path(config.model).name,
        "dtype": config.dtype,
        "temperature": args.temperature,
        "n": args.n,
        "num_prompts": len(groups),
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        "aseer": __version__,
        "vllm": " ".join(vllm) if vllm else None,
    }
    return make_trace(groups, outcome.responses, settings)


def make_trace(
    groups: Sequence[Group], responses: Sequence[Response], settings: dict[str, Any]
) -> Trace:
    """The responses in the order of the groups and their members."""
    found = {(r.group_id, r.index): r for r in responses}
    kept = []
    for group in groups:
        assert group.group_id is not None
        members = [found[group.group_id, i] for i in range(group.n)]
        kept.append(
            TraceGroup(
                np.array(members[0].prompt_token_ids, np.int32),
                [np.array(member.token_ids, np.int32) for member in members],
            )
        )
    return Trace(groups=kept, settings=settings)


def describe(recorded: Trace) -> str:
    """What a trace holds, and its checksum, in two lines."""
    lengths = [len(r) for group in recorded.groups for r in group.responses]
    cut = sum(n == recorded.max_tokens for n in lengths) / len(lengths)
    return (
        f"{len(recorded.groups)} groups, {recorded.num_requests} responses of "
        f"{recorded.num_tokens:,} tokens: mean {np.mean(lengths):.0f}, median "
        f"{np.median(lengths):.0f}, longest {max(lengths)}, {cut:.0%} cut off at "
        f"{recorded.max_tokens}\nsha256 {recorded.sha256}"
    )
