"""`aseer demo`: a whole rollout with a small real model, watched and written down.

It uses the library as any program would: an `Engine`, groups, `async for`, the live
display and the plot.
"""

from __future__ import annotations

import asyncio
import json
import platform
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, get_args

from rich.console import Console

from aseer import data, plot
from aseer.cli.arguments import positive_int
from aseer.cli.summary import Stages, print_group, print_summary
from aseer.compat.versions import installed_vllm
from aseer.config import POLICY_NAMES, EngineConfig
from aseer.display import Live
from aseer.errors import ConfigError
from aseer.groups import Group
from aseer.inputs.speculation import SpeculationMethod
from aseer.node.machine import fast_cpu_dtype
from aseer.runtime.engine import Engine
from aseer.sampling import SamplingParams
from aseer.version import __version__

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from aseer.report import Progress, RolloutReport
    from aseer.types import Response

    OpenEngine = Callable[[EngineConfig], AbstractAsyncContextManager["EngineLike"]]

DEFAULT_NUM_PROMPTS = 8
# Small enough that requests still wait when chunks end, so that some move.
DEFAULT_CHUNK_SIZE = 64
MAX_MODEL_LEN = 2048


class RolloutLike(Protocol):
    """What the demo needs of an `aseer.Rollout`."""

    def __aiter__(self) -> AsyncIterator[Response]:
        """Responses as they finish."""
        ...

    def progress(self) -> Progress | None:
        """For the display."""
        ...

    @property
    def report(self) -> RolloutReport:
        """Figures, after the end."""
        ...


class EngineLike(Protocol):
    """What the demo needs of an `aseer.Engine`."""

    def rollout(self, groups: Sequence[Group]) -> RolloutLike:
        """Begin a rollout."""
        ...


class Outcome(NamedTuple):
    """What a rollout gave."""

    responses: list[Response]
    report: RolloutReport


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add `demo` and its options."""
    parser = subparsers.add_parser(
        "demo",
        parents=[common],
        help="roll out prompts with a small real model, and watch",
        description="Roll out groups of responses on vLLM engines, with a live "
        "display; write report.json and timeline.png.",
    )
    parser.set_defaults(run=run)
    add_work_options(parser.add_argument_group("work"))
    add_engine_options(parser.add_argument_group("engines"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where report.json, timeline.png and the engines' logs go "
        "(default: runs/demo-<time>)",
    )
    output.add_argument(
        "--json",
        action="store_true",
        help="print report.json on stdout, and nothing else",
    )


def run(args: argparse.Namespace, *, open_engine: OpenEngine = Engine) -> int:
    """Run the demo and return the exit code.

    Raises:
        AseerError: a wrong option, the model cannot be had, the engines do not start,
            or a request failed.
    """
    console = Console(quiet=args.json, highlight=False)
    out = args.out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    stages = Stages(console)
    # First what is quick, so that a wrong option is told at once.
    groups = make_groups(args)
    config = make_config(args, log_dir=out / "logs")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot write to {out}: {exc}") from exc
    if args.model is None:
        with stages("prepare", "preparing SmolLM2-135M-Instruct"):
            config = replace(config, model=str(prepare_model(console, args)))
    outcome = asyncio.run(roll_out(config, groups, stages, console, open_engine))
    report = make_report(outcome, config, args, stages.seconds)
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"
    (out / "report.json").write_text(text, "utf-8")
    files = [out / "report.json"]
    try:
        files.append(plot.timeline(outcome.report, out / "timeline.png"))
    except ConfigError as exc:
        console.print(f"no timeline.png: {exc}", style="yellow", markup=False)
    print_summary(console, outcome.report, outcome.responses, stages.seconds)
    for path in files:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    if args.json:
        sys.stdout.write(text)
    return 0


def make_config(args: argparse.Namespace, *, log_dir: Path) -> EngineConfig:
    """The engine's settings that the options ask for.

    Without `--model`, the model is still to be set.

    Raises:
        ConfigError: an option that is not allowed.
    """
    sampling = SamplingParams(
        temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed
    )
    return EngineConfig(
        model=args.model or "smollm2",
        num_instances=args.instances,
        device=args.device,
        dtype=args.dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=args.max_num_seqs,
        chunk_size=args.chunk_size,
        policy=args.policy,
        speculation=args.speculation,
        sampling=sampling,
        log_dir=log_dir,
    )


def make_groups(args: argparse.Namespace) -> list[Group]:
    """A group for each prompt; its record, with the answer, is the metadata.

    Raises:
        AseerError: the prompt file cannot be used.
    """
    try:
        records = data.load_prompts(args.prompts)
    except OSError as exc:
        raise ConfigError(f"cannot read prompts: {exc}") from exc
    limit = args.num_prompts
    if limit is None and args.prompts is None:
        limit = DEFAULT_NUM_PROMPTS
    return [
        Group(
            prompt=record.messages or record.prompt or record.prompt_token_ids or (),
            n=args.n,
            group_id=record.id,
            metadata=record,
        )
        for record in records[:limit]
    ]


def make_report(
    outcome: Outcome,
    config: EngineConfig,
    args: argparse.Namespace,
    stages_s: dict[str, float],
) -> dict[str, Any]:
    """What report.json holds: the report's fields, the responses, what made them."""
    vllm = installed_vllm()
    return outcome.report.to_dict() | {
        "responses": [asdict(r) for r in outcome.responses],
        "config": asdict(config) | {"prompts": args.prompts, "n": args.n},
        "stages_s": stages_s,
        "versions": {
            "aseer": __version__,
            "vllm": " ".join(vllm) if vllm else None,
            "python": platform.python_version(),
        },
    }


def prepare_model(console: Console, args: argparse.Namespace) -> Path:
    """SmolLM2's directory, made if it is not there."""
    from aseer.models import WEIGHT_DTYPES, smollm2

    def show(line: str) -> None:
        console.print(f"    {line}", markup=False, soft_wrap=True)

    dtype = args.dtype if args.dtype in WEIGHT_DTYPES else fast_cpu_dtype()
    return smollm2.prepare(dtype=dtype, progress=show)


async def roll_out(
    config: EngineConfig,
    groups: list[Group],
    stages: Stages,
    console: Console,
    open_engine: OpenEngine,
) -> Outcome:
    """Open the engines, roll the groups out, close; groups are shown as they finish."""
    responses: list[Response] = []
    sizes = {group.group_id: group.n for group in groups}
    unfinished: dict[str, list[Response]] = {}
    async with AsyncExitStack() as stack:
        with stages("start_engines", "starting the engines"):
            engine = await stack.enter_async_context(open_engine(config))
        with stages("encode_prompts", "checking and encoding the prompts"):
            rollout = engine.rollout(groups)
        with stages("rollout", f"rolling out {len(groups)} groups of {groups[0].n}"):
            with Live(rollout, console=console):
                async for response in rollout:
                    responses.append(response)
                    members = unfinished.setdefault(response.group_id, [])
                    members.append(response)
                    if len(members) == sizes[response.group_id]:
                        print_group(console, unfinished.pop(response.group_id))
        with stages("close", "closing the engines"):
            await stack.aclose()
    return Outcome(responses, rollout.report)


def add_work_options(
    group: argparse._ArgumentGroup,
    num_prompts: str = f"{DEFAULT_NUM_PROMPTS}, or all of FILE",
) -> None:
    """Add what `make_groups` and `make_config` read of the work.

    Args:
        num_prompts: how many there are by default, in words.
    """
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="prompts to use (default: questions that come with aseer)",
    )
    group.add_argument(
        "--num-prompts",
        type=positive_int,
        metavar="N",
        help=f"take the first N prompts (default: {num_prompts})",
    )
    group.add_argument(
        "--n",
        type=positive_int,
        default=8,
        help="responses a prompt (default: %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=positive_int,
        default=512,
        metavar="N",
        help="the most tokens of a response (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.6,
        metavar="T",
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        help="makes the samples repeatable, up to rounding, with --speculation off",
    )


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """Add what `make_config` and `prepare_model` read of the engines."""
    group.add_argument(
        "--model",
        metavar="NAME_OR_DIR",
        help="as vLLM takes it (default: SmolLM2-135M-Instruct, prepared at first use)",
    )
    group.add_argument(
        "--instances",
        type=positive_int,
        metavar="N",
        help="engines to start (default: one a GPU; on a CPU one a core, at most two)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu", "sim"),
        default="auto",
        help="sim: simulated engines, which need no vLLM (default: %(default)s)",
    )
    group.add_argument(
        "--dtype", default="auto", help="as vLLM names it (default: %(default)s)"
    )
    group.add_argument(
        "--max-num-seqs",
        type=positive_int,
        default=16,
        metavar="N",
        help="requests an engine runs at once (default: %(default)s)",
    )
    group.add_argument(
        "--chunk-size",
        type=int,
        default=DEFAULT_CHUNK_SIZE,
        metavar="N",
        help="the most tokens of a chunk; 0 = undivided (default: %(default)s)",
    )
    group.add_argument(
        "--policy",
        # Nobody knows the lengths that "longest-first" needs.
        choices=[name for name in POLICY_NAMES if name != "longest-first"],
        default="context-aware",
        help="who runs next, and where (default: %(default)s)",
    )
    group.add_argument(
        "--speculation",
        choices=get_args(SpeculationMethod),
        # All three ideas are to be seen, unlike in `EngineConfig`.
        default="dgds",
        help="how tokens are drafted: dgds from what the group has written, suffix and "
        "ngram as vLLM does, or not (default: %(default)s)",
    )
