"""How fast and how small is the suffix tree, next to arctic-inference's?

Recorded responses are replayed in batches of 64 requests (8 groups of 8), a tree a
group. Every step drafts for all requests and then appends a token to each, as an engine
does; the two arms take turns to go first. Both hold the same texts to the same depth.
Steps count while at least 3/4 of the batch is running. The contexts that the rival
searches for are cut outside the clock, which counts this thread's processor time: other
work on the machine blurs the comparison less. What a look at that clock takes is taken
off.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from common import print_result, quantiles, result_line
from drafting import (
    add_arguments,
    import_arctic,
    read_traces,
    settings_of,
    synthetic_traces,
)

from aseer.dgds.cst import DEFAULT_MAX_MATCH, Drafts, SuffixForest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from aseer.data.trace import TraceGroup

BATCH_GROUPS = 8
MAX_DRAFT = 8
MIN_CONFIDENCE = 0.1


class Step(NamedTuple):
    """One step of a batch; each field has an entry a row."""

    rows: NDArray[np.int64]
    contexts: list[NDArray[np.int32]]
    tokens: NDArray[np.int32]


class Arm(Protocol):
    """A library under test, holding the trees of one batch."""

    def prepare(self, step: Step) -> None:
        """Build arguments; not timed."""

    def draft(self) -> object:
        """Draft for every row."""

    def append(self) -> None:
        """Append one token to every row."""

    def first_tokens(self, drafts: Any) -> list[int]:
        """First drafted token of every row, -1 for none; not timed."""

    def memory_bytes(self) -> int:
        """Size by the library's own account."""


class Ours:
    """A forest, and a handle for each row."""

    def __init__(self, groups: Sequence[TraceGroup], depth: int) -> None:
        self.forest = SuffixForest(max_match=depth)
        trees = [(self.forest.open_group(g.prompt), g.responses) for g in groups]
        self.requests = np.array(
            [self.forest.open_request(tree) for tree, texts in trees for _ in texts]
        )

    def prepare(self, step: Step) -> None:
        self._requests = self.requests[step.rows]
        self._limits = np.full(len(step.rows), MAX_DRAFT, np.int32)
        self._tokens = step.tokens
        self._offsets = np.arange(len(step.rows) + 1)

    def draft(self) -> Drafts:
        return self.forest.draft(
            self._requests, self._limits, min_confidence=MIN_CONFIDENCE
        )

    def append(self) -> None:
        self.forest.append(self._requests, self._tokens, self._offsets)

    def first_tokens(self, drafts: Drafts) -> list[int]:
        starts = drafts.offsets[:-1]
        tokens = np.append(drafts.tokens, -1)[starts]
        return [int(t) for t in np.where(np.diff(drafts.offsets) > 0, tokens, -1)]

    def memory_bytes(self) -> int:
        return self.forest.memory_bytes


class Arctic:
    """A tree a group, and the sequence number of each row in it."""

    def __init__(self, groups: Sequence[TraceGroup], depth: int) -> None:
        module = import_arctic()
        self._append = module.SuffixTree.extend_ndarray
        self._draft = module.SuffixTree.speculate_ndarray
        self.trees = [module.SuffixTree(depth) for _ in groups]
        self._places: list[tuple[Any, int]] = []
        for tree, group in zip(self.trees, groups, strict=True):
            self._append(tree, 0, group.prompt)
            self._places += [(tree, 1 + i) for i in range(len(group.responses))]

    def prepare(self, step: Step) -> None:
        places = [self._places[row] for row in step.rows]
        singles = np.split(step.tokens, len(step.tokens))
        self._lookups = [(p[0], c) for p, c in zip(places, step.contexts, strict=True)]
        self._appends = [(*p, t) for p, t in zip(places, singles, strict=True)]

    def draft(self) -> list[Any]:
        speculate = self._draft
        return [
            speculate(tree, context, MAX_DRAFT, 1.0, 0.0, MIN_CONFIDENCE, False)
            for tree, context in self._lookups
        ]

    def append(self) -> None:
        extend = self._append
        for tree, sequence, token in self._appends:
            extend(tree, sequence, token)

    def first_tokens(self, drafts: list[Any]) -> list[int]:
        return [int([*draft.token_ids, -1][0]) for draft in drafts]

    def memory_bytes(self) -> int:
        return sum(tree.estimate_memory() for tree in self.trees)


ARMS: dict[str, type[Ours | Arctic]] = {"ours": Ours, "arctic": Arctic}


def steps_of(groups: Sequence[TraceGroup], depth: int) -> Iterator[Step]:
    """Yield the steps that replay a batch, until its last response ends."""
    texts = [(g.prompt, response) for g in groups for response in g.responses]
    for i in range(max(len(response) for _, response in texts)):
        rows = [row for row, (_, response) in enumerate(texts) if len(response) > i]
        contexts = []
        for row in rows:
            prompt, response = texts[row]
            cut = response[max(0, i - depth) : i]
            if len(cut) < depth:
                cut = np.concatenate((prompt[-(depth - len(cut)) :], cut))
            contexts.append(cut)
        tokens = np.array([texts[row][1][i] for row in rows], np.int32)
        yield Step(np.array(rows), contexts, tokens)


def replay(groups: Sequence[TraceGroup], depth: int) -> dict[str, dict[str, Any]]:
    """Time both arms; seconds a request for each step, hits, bytes."""
    arms: dict[str, Arm] = {name: arm(groups, depth) for name, arm in ARMS.items()}
    results: dict[str, dict[str, Any]] = {
        name: {"append": [], "draft": [], "hits": 0} for name in arms
    }
    num_texts = sum(len(group.responses) for group in groups)
    for number, step in enumerate(steps_of(groups, depth)):
        order = list(arms) if number % 2 else list(reversed(arms))
        for name in order:
            arm, result = arms[name], results[name]
            arm.prepare(step)
            before = time.thread_time()
            start = time.thread_time()
            drafts = arm.draft()
            drafted = time.thread_time()
            arm.append()
            end = time.thread_time()
            if 4 * len(step.rows) >= 3 * num_texts:
                look = start - before
                result["draft"].append((drafted - start - look) / len(step.rows))
                result["append"].append((end - drafted - look) / len(step.rows))
            result["hits"] += int(
                (np.array(arm.first_tokens(drafts)) == step.tokens).sum()
            )
            del drafts  # Not while the other arm's are made, at its expense.
    for name, arm in arms.items():
        results[name]["bytes"] = arm.memory_bytes()
    return results


def resident_growth(name: str, groups: Sequence[TraceGroup], depth: int) -> int:
    """Bytes by which the process grows when it holds all texts in one arm's trees."""
    page_size = 4096
    batches = [list(steps_of([group], depth)) for group in groups]
    before = int(Path("/proc/self/statm").read_text().split()[1])
    held = []
    for group, steps in zip(groups, batches, strict=True):
        arm = ARMS[name]([group], depth)
        for step in steps:
            arm.prepare(step)
            arm.append()
        held.append(arm)
    after = int(Path("/proc/self/statm").read_text().split()[1])
    return (after - before) * page_size


def scaling(total_tokens: int, depth: int, seed: int) -> list[dict[str, float]]:
    """Cost of a token and of a draft as one forest grows to `total_tokens`."""
    group_tokens, chunk, num_requests = 8 * 2048, 32, 8 * BATCH_GROUPS
    batches = max(1, total_tokens // (BATCH_GROUPS * group_tokens))
    rng = np.random.default_rng(seed)
    forest = SuffixForest(max_match=depth)
    everyone: list[int] = []
    points = []
    appended = taken_s = 0.0
    limits = np.full(num_requests, MAX_DRAFT, np.int32)
    offsets = np.arange(num_requests + 1) * chunk
    for batch in range(batches):
        groups = synthetic_traces(
            num_groups=BATCH_GROUPS, num_responses=8, num_tokens=2048, seed=seed + batch
        )
        rows = []
        for group in groups:
            tree = forest.open_group(group.prompt)
            rows += [forest.open_request(tree) for _ in group.responses]
        requests = np.array(rows)
        everyone += rows
        texts = np.array([text for group in groups for text in group.responses])
        for i in range(0, texts.shape[1], chunk):
            tokens = texts[:, i : i + chunk].reshape(-1)
            start = time.thread_time()
            forest.append(requests, tokens, offsets)
            taken_s += time.thread_time() - start
            appended += len(tokens)
        if (batch + 1) * 10 // batches == batch * 10 // batches:
            continue
        picks = [rng.choice(everyone, num_requests, replace=False) for _ in range(50)]
        start = time.thread_time()
        for pick in picks:
            forest.draft(pick, limits, min_confidence=MIN_CONFIDENCE)
        drafts_s = time.thread_time() - start
        points.append(
            {
                "tokens": forest.num_tokens,
                "append_ns": taken_s / appended * 1e9,
                "draft_ns": drafts_s / len(picks) / num_requests * 1e9,
                "bytes_per_token": forest.memory_bytes / forest.num_tokens,
            }
        )
        appended = taken_s = 0.0
    return points


def compare(
    groups: Sequence[TraceGroup], depth: int, repetitions: int
) -> dict[str, Any]:
    """Replay all batches so many times, and sum up."""
    batches = [
        list(groups[i : i + BATCH_GROUPS]) for i in range(0, len(groups), BATCH_GROUPS)
    ]
    replay(batches[0], depth)  # Warms caches and clocks.
    rounds = [[replay(b, depth) for b in batches] for _ in range(repetitions)]
    results = [result for each in rounds for result in each]
    num_tokens = sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    figures: dict[str, Any] = {}
    for name in ARMS:
        for what in ("append", "draft"):
            samples = [x * 1e9 for result in results for x in result[name][what]]
            figures[f"{name}_{what}_ns"] = quantiles(samples)
        size = sum(result[name]["bytes"] for result in rounds[0])
        figures[f"{name}_bytes_per_token"] = size / num_tokens
        figures[f"{name}_first_token_hits"] = sum(r[name]["hits"] for r in rounds[0])
    if figures["ours_first_token_hits"] == 0:
        msg = "no drafted token was ever right: this measures a broken tree"
        raise SystemExit(msg)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in ARMS:
            grown = pool.apply(resident_growth, (name, groups, depth))
            figures[f"{name}_resident_bytes_per_token"] = grown / num_tokens
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--depth", type=int, default=DEFAULT_MAX_MATCH)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--scale-tokens", type=int, default=10_000_000)
    args = parser.parse_args()
    import_arctic()
    repetitions = 1 if args.smoke else args.repetitions
    groups = read_traces(args.traces, smoke=args.smoke)
    figures = compare(groups, args.depth, repetitions)
    total = 200_000 if args.smoke else args.scale_tokens
    ratios = {
        f"{ratio}_ratio": figures[f"arctic_{what}"] / figures[f"ours_{what}"]
        if ratio == "memory"
        else figures[f"arctic_{what}"]["median"] / figures[f"ours_{what}"]["median"]
        for ratio, what in (
            ("append", "append_ns"),
            ("lookup", "draft_ns"),
            ("memory", "bytes_per_token"),
        )
    }
    figures["scaling"] = scaling(total, args.depth, args.seed)
    figures = {**ratios, **figures}
    line = result_line("bench_cst", settings=settings_of(args), figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
