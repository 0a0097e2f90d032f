"""What does a step expose that waits for tokens before it drafts, on model runner V2?

Between the moment that a step's tokens are on the host and the next step's launch, the
device waits. Measured is the host's work in that time, part by part, on texts made up
here, of which siblings repeat most: what `aseer/dgds/ahead.py` does, and of vLLM's own
code what goes through the rows of a batch in Python (`vllm_rows`; where vLLM is
installed). Processor time of this thread, so that other work on the machine blurs it
less. What only a GPU can show is in docs/drafts-on-v2.md, from source.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from common import print_result, quantiles, result_line
from drafting import synthetic_traces

from aseer.dgds.ahead import Ahead
from aseer.dgds.budget import AdaptiveBudget
from aseer.dgds.replica import Replica
from aseer.dgds.rows import Rows
from aseer.dgds.steptime import StepTimeModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

NUM_ROWS = (1, 64, 255, 1024)
GROUP_SIZE = 8
MAX_DRAFT_TOKENS = 8
MAX_MODEL_LEN = 2048
RESPONSE_TOKENS = 600
WARM_UP = 20
# A step of an 8B model on an H100, roughly: what matters is that drafts pay.
STEP_S, TOKEN_S = 7e-3, 12e-6


@dataclass
class Output:
    """vLLM's SchedulerOutput, as far as it is looked at."""

    scheduled_new_reqs: list[Any]
    scheduled_cached_reqs: Any
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    scheduled_spec_decode_tokens: dict[str, list[int]]
    finished_req_ids: set[str]
    preempted_req_ids: set[str] | None = None


class Clock:
    """Sums processor time by part; parts within parts are taken off."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with its time added to a part's."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            since = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.thread_time() - since
                self.seconds[name] += taken - self._inner
                self._inner = outer + taken

        return run


class Engine:
    """Requests that go through their texts as drafts allow."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.clock = Clock()
        self.model = StepTimeModel()
        for num in (1, 4, 16, 64, 256, 1024, 4096):
            for drafted in (0, num, 4 * num):
                step_s = max(STEP_S, TOKEN_S * (num + drafted))
                self.model.observe(num, drafted, 0, step_s, is_profile=True)
        self.replica = Replica(ttl_s=600.0)
        budget = AdaptiveBudget(self.model, MAX_DRAFT_TOKENS, 2 * MAX_DRAFT_TOKENS)
        # Every step looks, whatever that is worth.
        budget.max_draft_tokens = lambda num: MAX_DRAFT_TOKENS  # type: ignore
        self.drafts: dict[str, NDArray[np.int64]] = {}
        rows = Rows(num_rows, MAX_MODEL_LEN)
        parts = (rows, self.replica, budget, self.model)
        self.ahead = Ahead(*parts, 2.0, MAX_MODEL_LEN, self.upload)
        self.time(budget)
        num_groups = -(-num_rows // GROUP_SIZE)
        groups = synthetic_traces(
            num_groups=num_groups,
            num_responses=GROUP_SIZE,
            num_tokens=RESPONSE_TOKENS,
            seed=seed,
        )
        self.texts: dict[str, NDArray[np.int32]] = {}
        self.places: dict[str, int] = {}
        self.new = []
        rng = np.random.default_rng(seed)
        for g, group in enumerate(groups):
            for r, response in enumerate(group.responses[: num_rows - g * GROUP_SIZE]):
                name = f"{g}-{r}"
                # Members of a group are at different places of their responses.
                start = int(rng.integers(1, RESPONSE_TOKENS // 2))
                self.texts[name], self.places[name] = response, start
                text = [*group.prompt.tolist(), *response[:start].tolist()]
                told = {"group": str(g), "request": name, "probe": r == 0}
                told["prompt_tokens"] = len(group.prompt)
                params = SimpleNamespace(
                    extra_args={"aseer": told},
                    max_tokens=RESPONSE_TOKENS,
                    min_tokens=0,
                    structured_outputs=None,
                )
                self.new.append(
                    SimpleNamespace(
                        req_id=name,
                        prefill_token_ids=text,
                        prompt_len=len(text),
                        sampling_params=params,
                    )
                )

    def time(self, budget: Any) -> None:
        """Have the parts of `prepare` timed."""
        clock, a = self.clock, self.ahead
        drafting: Any = a._drafting
        for owner, method, name in (
            (a, "_take", "take"),
            (drafting, "learn", "learn"),
            (drafting, "find", "find"),
            (drafting, "look", "look"),
            (budget, "choose", "choose"),
            (a, "_write", "write"),
            (a, "prepare", "rest"),
        ):
            setattr(owner, method, clock.timed(name, getattr(owner, method)))

    def upload(self, req_ids: Any, drafts: NDArray[np.int64]) -> None:
        self.drafts = dict(zip(req_ids, drafts, strict=True))

    def step(self) -> None:
        """Schedule, prepare and sample a step."""
        names = list(self.texts)
        spec = {} if self.new else {n: [-1] * MAX_DRAFT_TOKENS for n in names}
        counts = {n: 1 + len(spec.get(n, ())) for n in names}
        cached = SimpleNamespace(req_ids=[] if self.new else names)
        output = Output(self.new, cached, counts, sum(counts.values()), spec, set())
        self.new = []
        launched = self.ahead.prepare(output)
        self.ahead.launched()
        sampled = []
        for name in names:
            num = len(launched.scheduled_spec_decode_tokens.get(name, ()))
            rest = self.texts[name][self.places[name] :]
            draft = self.drafts[name][:num] if num else ()
            right = 0
            while right < num and right + 1 < len(rest) and draft[right] == rest[right]:
                right += 1
            self.places[name] += right + 1
            sampled.append(rest[: right + 1])
        tokens = np.zeros((len(names), max(map(len, sampled))), np.int64)
        for row, new in zip(tokens, sampled, strict=True):
            row[: len(new)] = new
        self.ahead.took(
            SimpleNamespace(
                model_runner_output=SimpleNamespace(
                    req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}
                ),
                copy_event=SimpleNamespace(synchronize=lambda: None),
                sampled_token_ids=tokens,
                num_sampled_tokens_np=np.array([len(s) for s in sampled], np.int32),
            )
        )
        self.launched = launched

    def is_over(self) -> bool:
        """Whether a text is about to end."""
        most = max(self.places.values())
        return most + 2 * MAX_DRAFT_TOKENS >= RESPONSE_TOKENS


def vllm_rows(launched: Any) -> float | None:
    """Seconds that V2 takes to sort and gather a batch's rows; None without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

    index = {name: i for i, name in enumerate(launched.num_scheduled_tokens)}
    spec = launched.scheduled_spec_decode_tokens
    computed = np.zeros(len(index), np.int32)
    since = time.thread_time()
    # `update_requests` and `gather_batch_req_state`, without their arithmetic.
    for name, blocks in zip(index, [None] * len(index), strict=True):
        computed[index[name]] = 7
        assert blocks is None
    ids = sort_batch_req_ids(launched.num_scheduled_tokens, spec, 9)
    for mapping, dtype in ((launched.num_scheduled_tokens, np.int32), (index, np.intp)):
        np.fromiter(map(mapping.__getitem__, ids), dtype=dtype, count=len(ids))
    lengths = (len(spec.get(name, ())) for name in ids)
    np.fromiter(lengths, dtype=np.int32, count=len(ids))
    return time.thread_time() - since


def measure(
    num_rows: int, num_steps: int, seed: int, *, with_vllm: bool
) -> dict[str, Any]:
    """Microseconds a step, by part, and how much was drafted."""
    engine = Engine(num_rows, seed)
    parts: defaultdict[str, list[float]] = defaultdict(list)
    drafted = 0
    measured = 0
    for number in range(WARM_UP + num_steps):
        engine.clock.seconds.clear()
        engine.step()
        if engine.is_over():
            break
        if number < WARM_UP:
            continue
        measured += 1
        seconds = dict(engine.clock.seconds)
        of_vllm = vllm_rows(engine.launched) if with_vllm else None
        if of_vllm is not None:
            seconds["vllm_rows"] = of_vllm
        seconds["all"] = sum(seconds.values())
        for name, taken in seconds.items():
            parts[name].append(1e6 * taken)
        drafted += sum(map(len, engine.launched.scheduled_spec_decode_tokens.values()))
    return {
        "drafted_a_row": round(drafted / max(1, measured) / num_rows, 2),
        "us": {name: quantiles(values, 1) for name, values in parts.items()},
    }


def main() -> None:
    """Measure each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds, not minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    num_rows = (1, 16) if args.smoke else NUM_ROWS
    steps = 5 if args.smoke else 100
    figures = {
        str(num): measure(num, steps, args.seed, with_vllm=not args.smoke)
        for num in num_rows
    }
    settings = {"smoke": args.smoke, "seed": args.seed}
    line = result_line("exposed", settings=settings, figures={"rows": figures})
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
