"""GRPO in plain PyTorch on rollouts by aseer: `python examples/grpo/train.py`.

A small Llama learns by examples how a search for a Countdown solution is written, then
by reinforcement to find solutions. Every iteration samples groups of responses, rewards
them as they arrive, takes gradient steps, and gives the engines the new weights.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from countdown import Problem, example, make_problem, reward, write_tokenizer
from metrics import Log
from samplers import AseerSampler, Sample, VllmSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

import aseer
from aseer.models import smollm2, tiny

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

EOS = tiny.EOS_ID


class Trained(NamedTuple):
    """A sample ready for the loss."""

    sample: Sample
    advantage: float


class Task:
    """Groups of prompts for a model that has a tokenizer, and what responses earn."""

    max_tokens: int

    def __init__(self, model: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def group(self, rng: random.Random, n: int) -> aseer.Group:
        """A problem at random; evaluation samples from the model as training does."""
        text, problem = self.problem(rng)
        prompt = self.tokenizer.encode(text, add_special_tokens=False)
        sampling = {"temperature": 1.0, "max_tokens": self.max_tokens}
        return aseer.Group(prompt, n, sampling, metadata=problem)

    def reward(self, sample: Sample) -> float:
        text = self.tokenizer.decode(sample.response, skip_special_tokens=True)
        return self.score(sample.problem, text)

    def problem(self, rng: random.Random) -> tuple[str, Any]:
        """A prompt, and what its responses are to be scored by."""
        raise NotImplementedError

    def score(self, problem: Any, response: str) -> float:
        raise NotImplementedError


class Countdown(Task):
    """The task for the small policy."""

    max_tokens = 192

    def problem(self, rng: random.Random) -> tuple[str, Problem]:
        problem = make_problem(rng)
        return problem.prompt, problem

    def score(self, problem: Problem, response: str) -> float:
        return reward(problem, response)


class Sums(Task):
    """The task for SmolLM2, which can hardly add: right if the last number is it."""

    max_tokens = 96

    def problem(self, rng: random.Random) -> tuple[str, int]:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        text = f"What is {a} + {b}? Answer with the number only."
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", a + b

    def score(self, problem: int, response: str) -> float:
        words = "".join(c if c.isdigit() else " " for c in response).split()
        return float(bool(words) and int(words[-1]) == problem)


# The policy


def make_warm(folder: Path, args: argparse.Namespace) -> None:
    """Write a Llama that has learnt by examples how a search is written."""
    rng = random.Random(f"warm-{args.seed}")
    torch.manual_seed(args.seed)
    width, heads = args.hidden_size, args.hidden_size // 64
    unfinished = folder.with_name(f"{folder.name}.new")
    tiny.make_tiny(  # for its configuration
        unfinished, hidden_size=width, intermediate_size=width * 8 // 3,
        num_heads=heads, num_kv_heads=heads, max_positions=512,
    )  # fmt: skip
    write_tokenizer(unfinished, vocab_size=128)
    tokenizer = AutoTokenizer.from_pretrained(unfinished)
    config = LlamaForCausalLM.config_class.from_pretrained(unfinished)
    policy = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, total_steps=args.warm_steps, pct_start=0.1
    )
    print(f"warm start: {policy.num_parameters():,} parameters", flush=True)
    for step, batch in enumerate(example_batches(rng, tokenizer, args.warm_steps)):
        logprobs = policy_logprobs(policy, [p + r for p, r in batch])
        mask = response_mask(batch, logprobs)
        loss = -(logprobs * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 50 == 0 or step == args.warm_steps - 1:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)
    policy.save_pretrained(unfinished)
    unfinished.replace(folder)


def example_batches(
    rng: random.Random, tokenizer: Any, num: int, size: int = 64
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Batches of (prompt, response), each of about the same lengths."""
    ready: list[list[tuple[list[int], list[int]]]] = []
    for _ in range(num):
        if not ready:
            pool = [example(rng, hit=0.15, give_up=0.3) for _ in range(8 * size)]
            pairs = [
                (tokenizer.encode(prompt), [*tokenizer.encode(response), EOS])
                for prompt, response in pool
            ]
            pairs.sort(key=lambda pair: len(pair[1]))
            ready = [pairs[k : k + size] for k in range(0, len(pairs), size)]
            rng.shuffle(ready)
        yield ready.pop()


def policy_logprobs(policy: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """[num_rows, longest - 1]: logprob of each row's tokens from the second on."""
    width = max(map(len, rows))
    # Padding comes last, where causal attention lets nothing see it.
    padded = [row + [EOS] * (width - len(row)) for row in rows]
    ids = torch.tensor(padded, device=policy.device)
    logits = policy(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def response_mask(
    pairs: list[tuple[list[int], list[int]]], like: torch.Tensor
) -> torch.Tensor:
    """1 where a response's tokens are."""
    mask = torch.zeros_like(like)
    for i, (prompt, response) in enumerate(pairs):
        mask[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = 1
    return mask


# One iteration


async def collect(
    sampler: Any, task: Task, problems: Iterator[aseer.Group], args: argparse.Namespace
) -> tuple[list[Trained], dict[str, float]]:
    """Roll out, rewarding groups as they arrive.

    With dynamic sampling (DAPO) a group whose responses all got the same reward, and so
    teach nothing, is dropped and another asked for, until the batch is full or so many
    groups were sampled that it may never be.
    """
    wanted: asyncio.Queue[bool] = asyncio.Queue()

    async def source() -> AsyncIterator[aseer.Group]:
        while await wanted.get():
            yield next(problems)

    num_left = args.groups * args.max_refill
    for _ in range(args.groups):
        wanted.put_nowait(True)
    groups = source() if args.dynamic else [next(problems) for _ in range(args.groups)]
    batch: list[Trained] = []
    rewards: list[float] = []
    lengths: list[int] = []
    num_kept = 0
    async with aclosing(sampler.rollout(groups)) as finished:
        async for samples in finished:
            scores = torch.tensor([task.reward(sample) for sample in samples])
            rewards += scores.tolist()
            lengths += [len(sample.response) for sample in samples]
            if args.dynamic and scores.std() == 0:
                num_left -= 1
                wanted.put_nowait(num_left > 0)
                continue
            advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
            batch += map(Trained, samples, advantages.tolist())
            num_kept += 1
            if args.dynamic and num_kept == args.groups:
                break  # what still runs is aborted
    lengths.sort()
    return batch, {
        "reward": sum(rewards) / len(rewards),
        "num_responses": len(rewards),
        "num_tokens": sum(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "p95_length": lengths[int(0.95 * len(lengths))],
    }


def train_on(
    policy: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    batch: list[Trained],
    rng: random.Random,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Gradient steps on the token-level clipped loss; returns what it measured.

    In the first minibatch trainer and engine have the same weights, so every importance
    ratio should be 1: `logprob_off` is by how much the two programs differ.
    """
    rng.shuffle(batch)
    size = -(-len(batch) // args.minibatches)
    measured: dict[str, float] = {}
    num_clipped = num_tokens = 0.0
    for start in range(0, len(batch), size):
        rows = sorted(batch[start : start + size], key=lambda t: len(t.sample.response))
        num_here = sum(len(t.sample.response) for t in rows)
        off_sum = off_max = ratio_sum = 0.0
        for k in range(0, len(rows), args.micro_batch):
            part = rows[k : k + args.micro_batch]
            pairs = [(t.sample.prompt, t.sample.response) for t in part]
            new = policy_logprobs(policy, [p + r for p, r in pairs])
            mask = response_mask(pairs, new)
            old = torch.zeros_like(new)
            sampled = [logprob for t in part for logprob in t.sample.logprobs]
            old[mask.bool()] = torch.tensor(sampled, device=policy.device)
            advantages = [[t.advantage] for t in part]
            advantage = torch.tensor(advantages, device=policy.device)
            ratio = torch.exp((new - old) * mask)
            clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
            gain = torch.min(ratio * advantage, clipped * advantage)
            (-(gain * mask).sum() / num_here).backward()
            off = ((new - old) * mask).detach().abs()
            off_sum += off.sum().item()
            off_max = max(off_max, off.max().item())
            ratio_sum += (ratio * mask).sum().item()
            num_clipped += (ratio != clipped).sum().item()
        measured = measured or {
            "logprob_off_mean": off_sum / num_here,
            "logprob_off_max": off_max,
            "ratio_mean": ratio_sum / num_here,
        }
        num_tokens += num_here
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    share = num_clipped / num_tokens
    return measured | {"clipped": share, "gradient_norm": norm.item()}


async def evaluate(sampler: Any, task: Task, args: argparse.Namespace) -> float:
    """Mean reward on problems that are never trained on."""
    rng = random.Random("held out")
    groups = [task.group(rng, 4) for _ in range(args.eval_problems)]
    rewards = [task.reward(s) async for group in sampler.rollout(groups) for s in group]
    return sum(rewards) / len(rewards)


# All of them


async def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    if args.model == "smollm2":
        warm = smollm2.prepare(dtype="float32")
    else:
        warm = Path(args.warm or out / "warm")
        if not warm.exists():
            make_warm(warm, args)
    task = (Sums if args.model == "smollm2" else Countdown)(warm)
    policy = AutoModelForCausalLM.from_pretrained(warm, dtype=torch.float32)
    policy.to(args.device)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    rng = random.Random(f"train-{args.seed}")
    state = out / "trainer.pt"
    first = 1
    if state.exists():
        saved = torch.load(state, weights_only=False)
        policy.load_state_dict(saved["policy"])
        optimiser.load_state_dict(saved["optimiser"])
        rng.setstate(saved["rng"])
        first = saved["iteration"] + 1
        print(f"going on after iteration {first - 1}")
    problems = iter(lambda: task.group(rng, args.group_size), None)
    make_sampler = VllmSampler if args.engine == "vllm" else AseerSampler
    ours = {
        "chunk_size": args.chunk_size,
        "speculation": args.speculation,
        "gpus": args.gpus.split(",") if args.gpus else None,
    }
    settings: dict[str, Any] = ours if args.engine == "aseer" else {}
    async with make_sampler(
        warm, num_instances=2, dtype="float32", max_model_len=512, max_num_seqs=128,
        kv_cache_bytes=1 << 30, seed=args.seed, **settings,
    ) as sampler:  # fmt: skip
        if state.exists():
            await sampler.update(policy, out / "weights")
        log = Log(out, first)
        if first == 1:
            log.write({"iteration": 0, "eval": await evaluate(sampler, task, args)})
        for iteration in range(first, args.iterations + 1):
            for group in optimiser.param_groups:  # down to 0 at the end
                group["lr"] = args.lr * (1 - (iteration - 1) / args.iterations)
            clock = [time.monotonic()]
            batch, row = await collect(sampler, task, problems, args)
            clock.append(time.monotonic())
            row |= train_on(policy, optimiser, batch, rng, args) if batch else {}
            clock.append(time.monotonic())
            await sampler.update(policy, out / "weights")
            clock.append(time.monotonic())
            rollout_s, train_s, update_s = (b - a for a, b in pairwise(clock))
            row |= {"rollout_s": rollout_s, "train_s": train_s, "update_s": update_s}
            row["tokens_per_s"] = row["num_tokens"] / rollout_s
            row["acceptance_length"] = sampler.acceptance_length
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                row["eval"] = await evaluate(sampler, task, args)
                save(state, policy, optimiser, rng, iteration)
            log.write({"iteration": iteration, **row})
    log.plot()
    policy.save_pretrained(out / "policy")


def save(
    path: Path,
    policy: PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    rng: random.Random,
    iteration: int,
) -> None:
    """Write everything that going on needs, all of it or nothing."""
    state = {
        "policy": policy.state_dict(),
        "optimiser": optimiser.state_dict(),
        "rng": rng.getstate(),
        "iteration": iteration,
    }
    unfinished = path.with_suffix(".new")
    torch.save(state, unfinished)
    unfinished.replace(path)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", default="runs/grpo", help="results and checkpoints; goes on from them")
    add("--engine", choices=["aseer", "vllm"], default="aseer")
    add("--model", choices=["small", "smollm2"], default="small")
    add("--warm", help="directory of the warm-started model; made if it is not there")
    add("--warm-steps", type=int, default=1000)
    add("--hidden-size", type=int, default=192, help="of the small model")
    add("--iterations", type=int, default=40)
    add("--groups", type=int, default=32, help="in an iteration")
    add("--group-size", type=int, default=8)
    add("--dynamic", action="store_true", help="drop groups that teach nothing (DAPO)")
    add("--max-refill", type=int, default=3, help="batches of groups it may drop")
    add("--speculation", choices=["off", "dgds"], default="off")
    add("--chunk-size", type=int, default=0, help="0: short responses stay whole")
    add("--minibatches", type=int, default=2)
    add("--micro-batch", type=int, default=16, help="responses in a forward pass")
    add("--lr", type=float, help="at first; falls (default: 2e-4, with smollm2 1e-5)")
    add("--clip-low", type=float, default=0.2)
    add("--clip-high", type=float, default=0.28)
    add("--eval-problems", type=int, default=128)
    add("--eval-every", type=int, default=5)
    add("--threads", type=int, default=2, help="the trainer's; engines idle meanwhile")
    add("--device", default="cpu", help="the trainer's, such as cuda:0")
    add("--gpus", help="the engines', such as 4,5 (default: all, or the CPU)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if args.lr is None:
        args.lr = 1e-5 if args.model == "smollm2" else 2e-4
    if args.dynamic and args.engine == "vllm":
        parser.error("--dynamic needs --engine aseer")
    return args


if __name__ == "__main__":
    asyncio.run(main(parse()))
