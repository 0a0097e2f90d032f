"""One simulated engine: continuous batching on a virtual clock.

Between events (a chunk ends, KV runs out, work arrives) the batch stays as it is, so
its steps need not be walked through one by one. With g tokens a step the KV that is
read grows by g a step, a step's time nearly linearly with it, and n steps take

    n t + n^2 d / 2        t the first step's time, d what each step adds

which `_Plan` solves both ways: when the next chunk ends, and how far the batch has come
at a moment in between. Steps are not rounded to whole ones. Requests that yield as many
tokens a step as each other (all of them, without speculation) form a *class*: a common
counter of tokens, and a heap of the counts at which its members end.

As in vLLM, work that does not fit waits in arrival order, and when the KV of running
requests has grown into all there is, the one admitted last is preempted: its KV is
dropped, it waits in front, and is computed anew. Prompts and recomputed tokens hold the
batch up for as long as they take (engines mix them with decoding, in the same time).
While a request runs, its siblings share the full blocks of its prompt's KV, if engines
are to share them at all.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aseer.sim.drafting import Drafting
    from aseer.sim.hardware import StepTime
    from aseer.types import Chunk, ChunkId, GroupId, RequestId

_EPSILON = 1e-6
_ALL = 1e18


class Ended(NamedTuple):
    """A chunk that is over, with the tokens it generated."""

    chunk: Chunk
    num_tokens: int
    num_cached: int


class _Work:
    """A chunk in the engine."""

    __slots__ = (
        "cached",
        "chunk",
        "class_",
        "end_at",
        "left",
        "loading",
        "num_shared",
        "num_tokens",
        "total",
    )

    def __init__(
        self, chunk: Chunk, num_tokens: int, class_: int, block_size: int
    ) -> None:
        self.chunk = chunk
        num_prompt_tokens = len(chunk.prompt) // 4
        self.num_tokens = num_prompt_tokens + len(chunk.generated) // 4  # at start
        # Of its prompt; a request computes at least one token.
        self.num_shared = (
            (num_prompt_tokens - 1) // block_size * block_size if block_size else 0
        )
        self.total = num_tokens
        self.left = float(num_tokens)  # while it does not run
        self.class_ = class_
        self.end_at = 0.0
        self.cached = 0
        self.loading = 0


class _Class:
    """Running requests that yield `rate` tokens a step each."""

    __slots__ = ("count", "done", "heap", "rate")

    def __init__(self) -> None:
        self.count = 0
        self.done = 0.0
        self.rate = 1.0
        self.heap: list[tuple[float, ChunkId]] = []


class SimEngine:
    """Runs chunks; times are seconds of the rollout."""

    def __init__(
        self,
        *,
        step_time: StepTime,
        num_kv_tokens: int,
        max_num_seqs: int,
        load_bytes_per_s: float | None = None,
        kv_bytes_per_token: float = 0.0,
        drafting: Drafting | None = None,
        shared_block_size: int = 0,
    ) -> None:
        """Start idle, at time 0.

        Args:
            load_bytes_per_s: from a pool that keeps all KV; None = there is no pool.
            drafting: None = no speculation.
            shared_block_size: siblings share full blocks of their prompt; 0 = they
                share nothing.
        """
        self._step_time = step_time
        self._capacity = float(num_kv_tokens)
        self._max_num_seqs = max_num_seqs
        self._load_s = (
            kv_bytes_per_token / load_bytes_per_s if load_bytes_per_s else None
        )
        self._drafting = drafting
        self._shared_block_size = shared_block_size
        self._num_sharing: Counter[GroupId] = Counter()
        num_classes = drafting.num_classes if drafting else 1
        self._classes = [_Class() for _ in range(num_classes)]
        self._running: OrderedDict[ChunkId, _Work] = OrderedDict()  # as admitted
        self._waiting: deque[_Work] = deque()
        self._ended: list[Ended] = []
        self._arriving: list[tuple[float, int, _Work]] = []  # their KV is loaded
        self._cache: OrderedDict[RequestId, int] = OrderedDict()  # of who waits
        self._cached = 0.0
        self._kv = 0.0  # of what runs, in tokens
        self._shared = 0.0  # counted more than once in that
        self._loading = 0.0  # KV held for what arrives
        self._stall_s = 0.0  # prefill that is to be done before the next step
        self._plan: _Plan | None = None
        self.now = 0.0
        self.version = 0  # of the plan
        self.num_preemptions = 0
        self.num_generated = 0.0
        self.num_steps = 0.0
        self.loaded_tokens = 0
        self.load_s = 0.0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._arriving)

    @property
    def kv_used(self) -> float:
        """Share of the KV capacity, 0 to 1."""
        return min(1.0, 1.0 - self._room / self._capacity)

    @property
    def _room(self) -> float:
        """Tokens of KV that are free; a request's last token has none yet."""
        held = self._kv - len(self._running) - self._shared + self._loading
        return self._capacity - held

    def add(self, chunk: Chunk, num_tokens: int, class_: int = 0) -> None:
        """A chunk arrives that will generate `num_tokens` tokens."""
        work = _Work(chunk, num_tokens, class_, self._shared_block_size)
        held = self._cache.pop(chunk.request_id, 0)
        self._cached -= held
        to_compute = work.num_tokens - 1
        if self._load_s is not None and chunk.generated and held < to_compute:
            missing = to_compute - held
            self.loaded_tokens += missing
            self.load_s += missing * self._load_s
            work.cached = to_compute
            work.loading = work.num_tokens - self._find(work)
            self._loading += work.loading
            self._evict()
            at = self.now + missing * self._load_s
            heapq.heappush(self._arriving, (at, chunk.chunk_id, work))
        else:
            work.cached = min(held, to_compute)
            self._waiting.append(work)
            self._admit()
        self._plan = None

    def set_class(self, chunk_id: ChunkId, class_: int) -> None:
        """A running request's drafts got better."""
        work = self._running.get(chunk_id)
        if work is not None and work.class_ != class_:
            self._leave(work)
            work.class_ = class_
            self._join(work)
            self._plan = None

    def next_event(self) -> float:
        """When something changes here by itself; infinity when idle."""
        if self._plan is None:
            self._plan = self._make_plan()
            self.version += 1
        if self._ended:
            return self.now
        at = self._plan.end_s
        return min(at, self._arriving[0][0]) if self._arriving else at

    def take_ended(self) -> list[Ended]:
        """Chunks that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def advance(self, now: float) -> None:
        """Move to a time that is not past the next event."""
        self._move(now)
        while self._arriving and self._arriving[0][0] <= now + _EPSILON:
            work = heapq.heappop(self._arriving)[2]
            self._loading -= work.loading
            self._run(work)
            self._plan = None
        self._end()
        if self._room < _EPSILON:
            self._preempt()
        self._admit()

    def _move(self, now: float) -> None:
        plan = self._plan or self._make_plan()
        self._plan = None
        passed = now - self.now
        self.now = now
        stalled = min(passed, self._stall_s)
        self._stall_s -= stalled
        steps = min(plan.steps_in(passed - stalled), plan.num_steps)
        if steps <= 0:
            return
        self.num_steps += steps
        for class_ in self._classes:
            class_.done += steps * class_.rate
        self._kv += steps * plan.tokens_a_step
        self.num_generated += steps * plan.tokens_a_step
        self._evict()

    def _end(self) -> None:
        for class_ in self._classes:
            heap = class_.heap
            while heap and heap[0][0] <= class_.done + _EPSILON * max(1.0, class_.rate):
                end_at, chunk_id = heapq.heappop(heap)
                work = self._running.get(chunk_id)
                if work is None or not self._is_entry(work, class_, end_at):
                    continue  # it left this class
                del self._running[chunk_id]
                class_.count -= 1
                self._unshare(work)
                held = work.num_tokens + work.total
                self._kv -= held
                self._keep(work.chunk.request_id, held - 1)
                self._ended.append(Ended(work.chunk, work.total, work.cached))
                self._plan = None

    def forget(self, request_id: RequestId) -> None:
        """A request is finished: its KV is freed."""
        self._cached -= self._cache.pop(request_id, 0)

    # What runs

    def _admit(self) -> None:
        """Let in what waits, in its order, as far as it fits."""
        while self._waiting and len(self._running) < self._max_num_seqs:
            work = self._waiting[0]
            held = work.num_tokens + work.total - work.left
            # The others take their next tokens first: who was preempted stays out.
            needed = held + len(self._running)
            found = self._find(work)
            if self._running and needed - found > self._room:
                return
            self._waiting.popleft()
            cached = max(work.cached, found)
            self._stall_s += self._step_time.prefill_s(int(held) - 1 - cached)
            self._run(work)
            self._plan = None

    def _run(self, work: _Work) -> None:
        self._running[work.chunk.chunk_id] = work
        self._kv += work.num_tokens + work.total - work.left
        self._shared += self._find(work)
        self._num_sharing[work.chunk.group_id] += 1
        self._join(work)
        self._evict()

    def _join(self, work: _Work) -> None:
        class_ = self._classes[work.class_]
        class_.count += 1
        work.end_at = class_.done + work.left
        heapq.heappush(class_.heap, (work.end_at, work.chunk.chunk_id))

    def _leave(self, work: _Work) -> None:
        class_ = self._classes[work.class_]
        class_.count -= 1
        work.left = max(0.0, work.end_at - class_.done)
        work.end_at = -1.0

    def _is_entry(self, work: _Work, class_: _Class, end_at: float) -> bool:
        """Whether a class's heap means this by an entry; classes may count alike."""
        return work.end_at == end_at and self._classes[work.class_] is class_

    def _preempt(self) -> None:
        """Drop whom vLLM would: the last that was admitted; never the only one."""
        if len(self._running) > 1:
            _, work = self._running.popitem()
            self._leave(work)
            self._unshare(work)
            self._kv -= work.num_tokens + work.total - work.left
            work.cached = 0
            self._waiting.appendleft(work)
            self.num_preemptions += 1
            self._plan = None

    def _find(self, work: _Work) -> int:
        """Tokens of its prompt that a sibling holds."""
        return work.num_shared if self._num_sharing[work.chunk.group_id] else 0

    def _unshare(self, work: _Work) -> None:
        group_id = work.chunk.group_id
        self._num_sharing[group_id] -= 1
        if self._num_sharing[group_id]:
            self._shared -= work.num_shared
        else:
            del self._num_sharing[group_id]

    # KV of requests that wait elsewhere, oldest first

    def _keep(self, request_id: RequestId, num_tokens: int) -> None:
        self._cache[request_id] = num_tokens
        self._cached += num_tokens
        self._evict()

    def _evict(self) -> None:
        while self._cache and self._cached > self._room:
            self._cached -= self._cache.popitem(last=False)[1]

    # Time

    def _make_plan(self) -> _Plan:
        num_running = len(self._running)
        if not num_running:
            return _Plan(math.inf, 0.0, 0.0, 0.0, 0.0)
        num_tokens = float(num_running)
        if self._drafting is not None:
            counts = [class_.count for class_ in self._classes]
            rates, num_drafted = self._drafting.rates(self._step_time, counts, self._kv)
            for class_, rate in zip(self._classes, rates, strict=True):
                class_.rate = rate
            num_tokens += num_drafted
        tokens_a_step = sum(class_.count * class_.rate for class_ in self._classes)
        steps = min(map(self._steps_to_end, self._classes))
        if num_running > 1:
            steps = min(steps, max(self._room, 0.0) / tokens_a_step)
        first = self._step_time.seconds(num_tokens, self._kv)
        last = self._step_time.seconds(num_tokens, self._kv + steps * tokens_a_step)
        added = (last - first) / steps if steps > _EPSILON else 0.0
        needed = self._stall_s + steps * first + steps * steps * added / 2
        return _Plan(self.now + needed, steps, first, added, tokens_a_step)

    def _steps_to_end(self, class_: _Class) -> float:
        heap = class_.heap
        while heap:
            end_at, chunk_id = heap[0]
            work = self._running.get(chunk_id)
            if work is not None and self._is_entry(work, class_, end_at):
                return max(0.0, end_at - class_.done) / class_.rate
            heapq.heappop(heap)
        return _ALL


class _Plan(NamedTuple):
    """The steps until the engine's next event, if nothing comes from outside."""

    end_s: float
    num_steps: float
    first_s: float
    added_s: float
    tokens_a_step: float

    def steps_in(self, seconds: float) -> float:
        """How many are done after so many seconds."""
        if seconds <= 0 or not self.first_s:
            return 0.0
        if self.added_s * seconds < 1e-9 * self.first_s**2:
            return seconds / self.first_s
        root = math.sqrt(self.first_s**2 + 2 * self.added_s * seconds)
        return (root - self.first_s) / self.added_s
