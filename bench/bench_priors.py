"""What is it worth to remember a prompt's earlier responses, and for how long?

The training of `examples/grpo`, on a fixed set of problems that come back every epoch.
In every iteration two pairs of engines get the same weights and roll out the same
groups, in turns. One forgets what it has seen; the other keeps lengths
(`length_priors`) and drafts (`after_weight_update="keep"`). The policy learns from the
first one's responses.

An estimate's error is how far it is, as a factor, from the group's longest response:
exp of the median |log|. Compared are the first sibling's length, when it finishes, and
the longest response of 1, 2, 4, ... epochs ago, which goes bad as the policy changes.

Expected: priors are nearer than the first sibling's length, which is of a short one.
Acceptance is a little higher with kept drafts. Throughput hardly differs, as this
model's responses are short. (It did, by a fifth: the drafts are of the same problem.)
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import ROOT, print_result, quantiles, result_line
from transformers import AutoModelForCausalLM

import aseer

sys.path.insert(0, str(ROOT / "examples" / "grpo"))
import train
from samplers import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.report import RolloutReport

ARMS = ("forget", "remember")


def config_of(model: Path, arm: str, args: argparse.Namespace) -> aseer.EngineConfig:
    """Two one-core engines that draft from groups."""
    remembers = arm == "remember"
    return aseer.EngineConfig(
        model=str(model),
        device="cpu",
        num_instances=args.engines,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=args.max_num_seqs,
        kv_cache_bytes=512 << 20,
        chunk_size=64,
        kv_pool="off",
        length_priors=remembers,
        speculation=aseer.SpeculationConfig(
            after_weight_update="keep" if remembers else "drop"
        ),
    )


def batch_of(
    responses: Sequence[aseer.Response], task: train.Countdown
) -> list[train.Trained]:
    """What the policy learns from."""
    groups = defaultdict(list)
    for r in responses:
        sample = Sample(r.metadata, r.prompt_token_ids, r.token_ids, r.logprobs)
        groups[r.group_id].append(sample)
    batch: list[train.Trained] = []
    for samples in groups.values():
        scores = torch.tensor([task.reward(sample) for sample in samples])
        advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
        batch += map(train.Trained, samples, advantages.tolist())
    return batch


def lengths_of(report: RolloutReport) -> dict[str, list[int]]:
    """Of each group, in the order in which its responses finished."""
    lengths = defaultdict(list)
    for done in sorted(report.completions, key=lambda c: c.t_s):
        lengths[done.group_id].append(done.num_output_tokens)
    return lengths


def error_factor(pairs: Sequence[tuple[int, int]]) -> float:
    """Of estimates, each with what came."""
    off = [abs(math.log(estimate / longest)) for estimate, longest in pairs]
    return round(math.exp(statistics.median(off)), 3)


def run(warm: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train, and measure both arms in every iteration."""
    task, rng = train.Countdown(warm), random.Random(args.seed)
    settings = train.parse([])
    problems = [
        aseer.Group(g.prompt, g.n, g.sampling, metadata=g.metadata, group_id=str(i))
        for i, g in enumerate(
            task.group(rng, args.group_size) for _ in range(args.problems)
        )
    ]
    policy = AutoModelForCausalLM.from_pretrained(warm, dtype=torch.float32)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    reports: dict[str, list[RolloutReport]] = {arm: [] for arm in ARMS}
    rewards = []
    with ExitStack() as stack:
        engines = {
            arm: stack.enter_context(aseer.Engine(config_of(warm, arm, args)))
            for arm in ARMS
        }
        for iteration in range(args.iterations):
            first = iteration * args.groups
            groups = [problems[(first + k) % len(problems)] for k in range(args.groups)]
            batch: list[train.Trained] = []
            for arm in ARMS[:: 1 if iteration % 2 else -1]:
                rollout = engines[arm].rollout_sync(groups)
                responses = list(rollout)
                reports[arm].append(rollout.report)
                if arm == ARMS[0]:
                    batch = batch_of(responses, task)
            rewards.append(statistics.mean(task.reward(t.sample) for t in batch))
            train.train_on(policy, optimiser, batch, rng, settings)
            for engine in engines.values():
                engine.update_weights_sync(policy)
            rates = {arm: r[-1].throughput_tok_s for arm, r in reports.items()}
            print(f"{iteration}: reward {rewards[-1]:.3f}, {rates}", flush=True)
    return figures_of(reports, rewards, args.problems // args.groups)


def figures_of(
    reports: dict[str, list[RolloutReport]], rewards: list[float], epoch: int
) -> dict[str, Any]:
    """What is compared; the first epoch, in which nothing is known, is left out.

    Args:
        epoch: iterations until a problem comes back.
    """
    rollouts = [lengths_of(report) for report in reports["remember"]]
    firsts = [(n[0], max(n)) for rollout in rollouts[epoch:] for n in rollout.values()]
    errors = {"first sibling": error_factor(firsts)}
    age = 1
    while age * epoch < len(rollouts):
        old_and_new = zip(rollouts, rollouts[age * epoch :], strict=False)
        errors[f"longest, {age} epochs ago"] = error_factor(
            [(max(old[g]), max(new[g])) for old, new in old_and_new for g in new]
        )
        age *= 2
    pairs = list(zip(*(r[epoch:] for r in reports.values()), strict=True))
    drafts = {arm: [r.speculation for r in own[epoch:]] for arm, own in reports.items()}
    return {
        "error_factor": errors,
        "acceptance_length": {
            arm: quantiles([d.acceptance_length for d in own if d])
            for arm, own in drafts.items()
        },
        "remember_over_forget": quantiles(
            [b.throughput_tok_s / a.throughput_tok_s for a, b in pairs]
        ),
        "reward": [round(reward, 4) for reward in rewards],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--warm", type=Path, help="warm-started model; made if it is not there")
    add("--problems", type=int, default=32)
    add("--groups", type=int, default=32, help="in an iteration")
    add("--group-size", type=int, default=8)
    add("--iterations", type=int, default=17)
    add("--engines", type=int, default=2)
    add("--max-num-seqs", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="hardly trained, three iterations")
    add("--save", help="file for the result")
    args = parser.parse_args()
    options = ["--seed", str(args.seed)]
    if args.smoke:
        options += ["--warm-steps", "8", "--hidden-size", "128"]
        args.problems = args.groups = args.iterations = 3
        args.group_size = 4
    if args.problems % args.groups:
        parser.error("--problems must be a multiple of --groups")
    with tempfile.TemporaryDirectory() as folder:
        warm = args.warm or Path(folder) / "warm"
        if not warm.exists():
            train.make_warm(warm, train.parse(options))
        figures = run(warm, args)
    settings = {k: v for k, v in vars(args).items() if k not in ("save", "warm")}
    line = result_line("priors", settings=settings, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
