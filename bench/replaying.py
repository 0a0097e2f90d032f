"""What benchmarks replay, on which model, and what `bench_rollout_vllm.py` compares."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from drafting import synthetic_traces
from rich.console import Console

from aseer.cli import record
from aseer.cli.main import build_parser
from aseer.data import trace
from aseer.data.trace import Trace, TraceGroup
from aseer.errors import ConfigError
from aseer.models import smollm2, tiny
from aseer.node import process
from aseer.node.machine import fast_cpu_dtype

if TYPE_CHECKING:
    import argparse

    import aseer
    from aseer.config import PolicyName
    from aseer.report import RolloutReport

# Random weights in SmolLM2's shape: of a GPU's step, sampling from 49k tokens takes
# little, but of a core's it takes as much as the model.
SMALL_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 576,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "intermediate_size": 1536,
}
# Of Qwen3-8B's configuration what makes its shape.
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": tiny.EOS_ID,
    "eos_token_id": tiny.EOS_ID,
}


class Arm(NamedTuple):
    """One way to roll out.

    Attributes:
        drafting: whose engines it runs on.
        knows_lengths: of all responses beforehand, which nobody does in training.
        pool: engines find each other's KV, as aseer has it by default.
        wanted: share of the groups that ends the rollout; the others are aborted.
    """

    name: str
    label: str
    policy: PolicyName
    drafting: Literal["off", "suffix", "dgds"] = "off"
    knows_lengths: bool = False
    pool: bool = False
    wanted: float = 1.0

    def order(self, recorded: Trace, seed: int) -> list[tuple[int, TraceGroup]]:
        """The groups as they are handed out, each with its place in the trace."""
        groups = list(enumerate(recorded.groups))
        random.Random(seed).shuffle(groups)
        if self.knows_lengths and self.policy == "group-least-unfinished":
            groups.sort(key=lambda item: -sum(map(len, item[1].responses)))
        return groups


class Run(NamedTuple):
    """One arm's rollout in one repetition."""

    repetition: int
    arm: str
    figures: dict[str, float]
    report: RolloutReport


ARMS = (
    Arm("verl-today", "each request to the least loaded", "least-loaded"),
    Arm("paper-verl", "whole groups in turn", "group-round-robin"),
    Arm("openrlhf", "whole groups, fewest unfinished", "group-least-unfinished"),
    Arm(
        "streamrl-like",
        "whole groups, longest first (true lengths)",
        "group-least-unfinished",
        knows_lengths=True,
    ),
    Arm("verl-today+suffix", "with vLLM's suffix drafts", "least-loaded", "suffix"),
    Arm("paper-verl+suffix", "the same", "group-round-robin", "suffix"),
    Arm("openrlhf+suffix", "the same", "group-least-unfinished", "suffix"),
    Arm("divided", "chunks, first come first served", "fcfs", pool=True),
    Arm("context-aware", "+ probes and length estimates", "context-aware", pool=True),
    Arm("full", "+ grouped drafts (DGDS)", "context-aware", "dgds", pool=True),
    Arm("oracle", "longest first (true lengths)", "longest-first", "off", True, True),
    Arm("oracle+dgds", "with DGDS", "longest-first", "dgds", True, True),
    Arm(
        "partial",
        "OFF-POLICY: ends with half of the groups",
        "least-loaded",
        wanted=0.5,
    ),
)


def find_trace(args: argparse.Namespace) -> Trace:
    """The trace that is named, the last recorded one, or for a short run a new one."""
    if args.smoke and args.trace is None:
        return smoke_trace()
    path = args.trace or record.default_path(0.7)
    if path.exists() or args.trace is not None:
        print(f"replays {path.name}")
        return trace.load(path)
    if not args.quick:
        raise SystemExit(f"there is no {path}; run `aseer record` first")
    print(f"there is no {path}: recording {args.groups} groups", flush=True)
    options = {"--num-prompts": args.groups, "--max-tokens": args.max_tokens}
    words = [str(word) for option in options.items() for word in option]
    parsed = build_parser().parse_args(["record", *words])
    return record.record(parsed, Console(highlight=False))


def smoke_trace() -> Trace:
    """Made-up texts of different lengths."""
    rng = random.Random(0)
    made = synthetic_traces(num_groups=4, num_responses=4, num_tokens=120, seed=0)
    groups = [
        TraceGroup(g.prompt, [r[: rng.choice((9, 40, 80, 120))] for r in g.responses])
        for g in made
    ]
    return Trace(groups=groups, settings={"max_tokens": 120, "model": "made up"})


def make_model(args: argparse.Namespace, folder: Path) -> Path:
    """The directory of the model that is named."""
    dtype = fast_cpu_dtype() if args.dtype == "auto" else args.dtype
    if args.model == "smollm2":
        return smollm2.prepare(dtype=dtype, progress=print)
    if args.model == "small":
        shape = SMALL_SHAPE | ({"num_layers": args.layers} if args.layers else {})
        return tiny.make_tiny(folder / "small", dtype=dtype, **shape)
    if args.model == "qwen3-8b":
        model = tiny.make_tiny(folder / "qwen3-8b")  # for its tokenizer
        (model / "model.safetensors").unlink()
        layers = {"num_hidden_layers": args.layers} if args.layers else {}
        (model / "config.json").write_text(json.dumps(QWEN3_8B | layers))
        args.load_format = "dummy"
        return model
    if args.model == "tiny":
        return tiny.make_tiny(folder / "tiny")
    return Path(args.model)


def emit(path: Path) -> None:
    """Engines that start from now on emit the texts of the trace in that file."""
    process.MODULE = ("aseer.instance.vllm.replay", str(path))


def sampling_of(recorded: Trace, temperature: float, end_token: int) -> dict[str, Any]:
    """With which a request emits its recorded tokens."""
    return {
        "temperature": temperature,
        "max_tokens": recorded.max_tokens,
        "ignore_eos": True,
        "stop_token_ids": [end_token],
        "detokenize": False,
    }


def check(response: aseer.Response, recorded: Trace) -> None:
    """A response has its recorded tokens; one that was aborted, the first of them.

    Raises:
        RuntimeError: it has not.
    """
    expected = recorded.groups[int(response.group_id)].responses[response.index]
    if response.finish_reason == "aborted":
        expected = expected[: len(response.token_ids)]
    if response.token_ids != expected.tolist():
        raise RuntimeError(f"{response.request_id} has other tokens")


def forget(engine: aseer.Engine) -> None:
    """What earlier rollouts left, KV and drafts, is not found any more."""
    assert engine._host is not None
    engine._host.weights.version += 1


def fit(recorded: Trace, model: Path) -> tuple[Trace, int]:
    """The trace in the model's vocabulary, and the token that ends responses.

    As it is if the model has its tokens and one of them only ends responses; otherwise
    by rank.
    """
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    largest = max(
        int(text.max()) for g in recorded.groups for text in (g.prompt, *g.responses)
    )
    end_token = recorded.end_token(tiny.EOS_ID)
    with suppress(ConfigError):
        if largest < vocab_size:
            return recorded.as_is(end_token), end_token
    return recorded.by_rank(vocab_size, tiny.EOS_ID), tiny.EOS_ID
