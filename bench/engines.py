"""Engines that replay a recorded rollout: as large as it needs, and all alike."""

from __future__ import annotations

import json
import statistics
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import aseer

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from replaying import Arm

    from aseer.data.trace import Trace

MAX_DRAFT_TOKENS = 16
BLOCK_SIZE = 32


class Sizes(NamedTuple):
    """What engines are started with."""

    max_model_len: int
    num_kv_blocks: int


def sizes_of(recorded: Trace, args: argparse.Namespace) -> Sizes:
    """The longest request fits in any case."""
    longest_prompt = max(len(group.prompt) for group in recorded.groups)
    max_model_len = _round_up(longest_prompt + recorded.max_tokens + 1)
    needs = sorted(
        len(group.prompt) + len(response)
        for group in recorded.groups
        for response in group.responses
    )
    at_once = min(args.max_num_seqs, -(-len(needs) // args.engines))
    if args.kv == "plentiful":
        num_tokens = sum(_round_up(n + MAX_DRAFT_TOKENS) for n in needs[-at_once:])
    else:
        num_tokens = round(args.kv_share * at_once * statistics.mean(needs))
    num_tokens = max(num_tokens, max_model_len + MAX_DRAFT_TOKENS)
    return Sizes(max_model_len, _round_up(num_tokens) // BLOCK_SIZE + 1)


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE


class Kind(NamedTuple):
    """What engines of different arms differ in."""

    drafting: Any
    pool: bool


def kind_of(arm: Arm, args: argparse.Namespace) -> Kind:
    """The engines that an arm runs on."""
    return Kind(arm.drafting, arm.pool and args.kv_pool != "off")


def config_of(
    model: Path, kind: Kind, sizes: Sizes, args: argparse.Namespace
) -> aseer.EngineConfig:
    """The engines of all arms of a kind."""
    speculation = aseer.SpeculationConfig(method=kind.drafting)
    if kind.drafting == "suffix":
        speculation = aseer.SpeculationConfig(
            method="suffix",
            max_draft_tokens=MAX_DRAFT_TOKENS,
            tail_draft_tokens=MAX_DRAFT_TOKENS,
        )
    return aseer.EngineConfig(
        model=str(model),
        num_instances=args.engines,
        dtype=args.dtype,
        max_model_len=sizes.max_model_len,
        max_num_seqs=args.max_num_seqs,
        chunk_size=args.chunk_size,
        speculation=speculation,
        kv_pool=aseer.KvPoolConfig(
            mode=args.kv_pool if kind.pool else "off",
            chunk_tokens=min(128, _round_up(args.chunk_size)),
        ),
        engine_args={
            "num_gpu_blocks_override": sizes.num_kv_blocks,
            "block_size": BLOCK_SIZE,
            "load_format": args.load_format,
            **json.loads(args.engine_args),
        },
        # On V2 vLLM has no suffix drafts; else each arm has what its users have.
        env={"VLLM_USE_V2_MODEL_RUNNER": "0"} if kind.drafting == "suffix" else {},
    )


class Engines:
    """Engines of every kind: all up at once, or one kind after the other."""

    def __init__(self, model: Path, sizes: Sizes, args: argparse.Namespace) -> None:
        self._model, self._sizes, self._args = model, sizes, args
        self._stack = ExitStack()
        self._engines: dict[Kind, aseer.Engine] = {}

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End those that are up."""
        self._engines.clear()
        self._stack.close()

    def of(self, kind: Kind) -> aseer.Engine:
        """The engine of a kind, warmed up; those of others are ended if need be."""
        engine = self._engines.get(kind)
        if engine is None:
            if self._args.restart:
                self.close()
            config = config_of(self._model, kind, self._sizes, self._args)
            engine = self._stack.enter_context(aseer.Engine(config))
            self._engines[kind] = engine
            warm_up(engine, self._args)
        return engine


def warm_up(engine: aseer.Engine, args: argparse.Namespace) -> None:
    """The first steps of a process are slow; these requests are not in the trace."""
    sampling = {"temperature": args.temperature, "max_tokens": 32, "ignore_eos": True}
    for size in (1, args.max_num_seqs * args.engines):
        group = aseer.Group([5, 6, 7], n=size, group_id="warm-up", sampling=sampling)
        list(engine.rollout_sync([group]))
