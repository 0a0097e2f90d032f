"""Every request yields one response, whatever dies (I1); reservations fit (I3)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aseer.config import POLICY_NAMES
from aseer.controller import Controller
from aseer.core.commands import Abort, Dispatch, Finished
from aseer.policies import POLICIES
from aseer.types import ChunkId, GroupId, InstanceId
from tests.unit.builders import info_of, report_of, task_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.config import PolicyName
    from aseer.core.commands import Command
    from aseer.types import Chunk, ChunkProgress, InstanceInfo, Response, Task

NUM_INSTANCES = 3


@dataclass
class Running:
    """A chunk on an engine; its tokens are their own positions in the response.

    Attributes:
        copy: of its prompt's KV, which siblings that run may use, too.
    """

    chunk: Chunk
    copy: ChunkId
    made: int = 0
    aborted: bool = False

    def make(self, num_tokens: int) -> range:
        start = len(self.chunk.generated) // 4 + self.made
        num_tokens = min(num_tokens, self.chunk.max_tokens - self.made)
        self.made += num_tokens
        return range(start, start + num_tokens)

    @property
    def is_full(self) -> bool:
        return self.made == self.chunk.max_tokens


class ControllerMachine(RuleBasedStateMachine):
    """Groups come and are cancelled; instances die, come back, and answer as they
    can.
    """

    @initialize(
        policy=st.sampled_from(POLICY_NAMES),
        chunk_size=st.sampled_from([0, 4, 8]),
        starvation_interval=st.sampled_from([0, 2]),
    )
    def begin(
        self, policy: PolicyName, chunk_size: int, starvation_interval: int
    ) -> None:
        self.controller = self.new_controller(
            policy=policy,
            chunk_size=chunk_size,
            starvation_interval=starvation_interval,
            max_request_retries=2,
        )
        self.reserves = POLICIES[policy].reserves_kv
        self.alive: dict[InstanceId, InstanceInfo] = {}
        self.running: dict[ChunkId, Running] = {}
        self.found_at: dict[ChunkId, float] = {}  # since when copies can be found
        self.old: list[ChunkProgress] = []
        self.tasks: dict[GroupId, Task] = {}
        self.cancelled: set[GroupId] = set()
        self.responses: dict[str, Response] = {}
        self.num_tokens = 0
        self.now = 0.0

    def new_controller(self, **settings: Any) -> Controller:
        return Controller(**settings)

    # What may happen

    @rule(
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        num_prompt_tokens=st.integers(1, 12),
        max_tokens=st.integers(1, 30),
        undivided=st.booleans(),
    )
    def groups_come(
        self, sizes: list[int], num_prompt_tokens: int, max_tokens: int, undivided: bool
    ) -> None:
        tasks = [
            task_of(
                f"g{len(self.tasks) + n}",
                num_requests=size,
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens,
                undivided_because="bad_words" if undivided else None,
            )
            for n, size in enumerate(sizes)
        ]
        self.tasks.update((task.group_id, task) for task in tasks)
        self.do(self.controller.add_groups(tasks, self.tick()))

    @rule(
        i=st.integers(0, NUM_INSTANCES - 1),
        num_kv_blocks=st.integers(11, 40),
        max_num_seqs=st.integers(1, 6),
        shares_prompts=st.booleans(),
    )
    def instance_comes_up(
        self, i: int, num_kv_blocks: int, max_num_seqs: int, shares_prompts: bool
    ) -> None:
        if InstanceId(i) not in self.alive:
            info = info_of(
                i,
                num_kv_blocks=num_kv_blocks,
                max_num_seqs=max_num_seqs,
                shares_prompts=shares_prompts,
            )
            self.alive[info.instance_id] = info
            self.do(self.controller.instance_up(info, self.tick()))

    @rule(
        i=st.integers(0, NUM_INSTANCES - 1),
        is_blameless=st.booleans(),
        with_all=st.booleans(),
    )
    def instance_dies(self, i: int, is_blameless: bool, with_all: bool) -> None:
        gone = [InstanceId(i)]
        if with_all and not is_blameless:
            gone += [each for each in self.alive if each != i]
        for each in gone:
            self.alive.pop(each, None)
        for chunk_id, running in list(self.running.items()):
            if running.chunk.instance_id in gone:
                del self.running[chunk_id]
                self.old.append(report_of(chunk_id, [0], end="stop"))
        first, *partners = gone
        if is_blameless:
            self.do(self.controller.instance_left(first, self.tick(), "it left"))
        else:
            down = self.controller.instance_down
            self.do(down(first, self.tick(), "it died", partners))

    @rule(
        picks=st.lists(
            st.tuples(
                st.integers(0, 1000),
                st.integers(0, 30),
                st.sampled_from(["", "", "", "stop", "error", "aborted"]),
            ),
            min_size=1,
            max_size=4,
        )
    )
    def engines_report(self, picks: list[tuple[int, int, str]]) -> None:
        reports = []
        for pick, num_tokens, end in picks:
            if self.running:
                chunk_id = sorted(self.running)[pick % len(self.running)]
                reports.append(self.report(chunk_id, num_tokens, end))
        self.do(self.controller.progress(reports, self.tick()))

    @rule(pick=st.integers(0, 1000))
    def a_report_comes_late(self, pick: int) -> None:
        if self.old:
            report = self.old[pick % len(self.old)]
            assert self.controller.progress([report, report], self.tick()) == []

    @rule(pick=st.integers(0, 1000))
    def group_is_cancelled(self, pick: int) -> None:
        if self.tasks:
            group_id = sorted(self.tasks)[pick % len(self.tasks)]
            self.cancelled.add(group_id)
            self.do(self.controller.cancel_group(group_id, self.tick()))

    # What must hold

    @invariant()
    def integrity_holds(self) -> None:
        if hasattr(self, "controller"):
            self.controller.check_integrity()

    @invariant()
    def reservations_fit(self) -> None:
        if not hasattr(self, "controller") or not self.reserves:
            return
        for instance_id, info in self.alive.items():
            here = [
                r for r in self.running.values() if r.chunk.instance_id == instance_id
            ]
            assert len(here) <= info.max_num_seqs
            of_copies = 0
            for copy in {r.copy: r for r in here}.values():
                of_copies += self.num_prompt_blocks(copy.chunk)
            for chunk in (r.chunk for r in here):
                total = len(chunk.prompt + chunk.generated) // 4 + chunk.max_tokens
                own = info.blocks_for(total - 1) - self.num_prompt_blocks(chunk)
                assert chunk.num_reserved_blocks == own
            used = of_copies + sum(r.chunk.num_reserved_blocks for r in here)
            free = self.controller.scheduler.fleet.num_free_blocks(instance_id)
            assert used <= info.num_kv_blocks - free <= info.num_kv_blocks
            if not here:
                assert free == info.num_kv_blocks

    @invariant()
    def the_controller_knows_what_runs(self) -> None:
        if hasattr(self, "controller"):
            counts = Counter(r.chunk.instance_id for r in self.running.values())
            for i in range(NUM_INSTANCES):
                assert self.controller.running.num_on(InstanceId(i)) == counts[i]

    @invariant()
    def something_runs_if_anything_can(self) -> None:
        if hasattr(self, "controller") and self.alive and self.controller.num_waiting:
            assert self.running

    @invariant()
    def tokens_are_counted_once(self) -> None:
        if hasattr(self, "controller"):
            kept = sum(r.num_generated for r in self.controller.buffer.requests())
            kept += sum(len(r.token_ids) for r in self.responses.values())
            counters = self.controller.counters
            had = counters.num_replayed_tokens + counters.num_resumed_tokens
            assert counters.num_output_tokens + had == kept

    @invariant()
    def the_longest_running_is_known(self) -> None:
        if hasattr(self, "controller"):
            running = [
                r.num_generated
                for r in self.controller.buffer.requests()
                if r.chunk is not None
            ]
            found = self.controller.buffer.longest_running()
            assert max(running, default=None) == (found[1] if found else None)

    @invariant()
    def only_what_is_unfinished_is_kept(self) -> None:
        if hasattr(self, "controller"):
            for request in self.controller.buffer.requests():
                if request.request_id in self.responses:
                    assert (request.num_generated, request.generated) == (0, b"")
            for group_id in self.tasks:
                assert self.controller.buffer.has_group(group_id)

    def teardown(self) -> None:
        """When every engine answers, everything ends."""
        if not hasattr(self, "controller"):
            return
        if not self.alive:
            self.instance_comes_up(0, 40, 6, True)
        num_rounds = 0
        while self.running:
            num_rounds += 1
            assert num_rounds < 10_000, "it never ends"
            for chunk_id in list(self.running):
                end = "aborted" if self.running[chunk_id].aborted else ""
                report = self.report(chunk_id, 1000, end)
                self.do(self.controller.progress([report], self.tick()))
        assert (self.controller.num_unfinished, self.controller.num_waiting) == (0, 0)
        self.controller.check_integrity()
        wanted = {
            f"{task.group_id}/{i}"
            for task in self.tasks.values()
            for i in range(task.num_requests)
        }
        assert set(self.responses) == wanted
        counters = self.controller.counters
        assert counters.num_finished == len(wanted)
        assert counters.num_groups_finished == len(self.tasks)
        self.check_counts_of_chunks()

    def check_counts_of_chunks(self) -> None:
        counters = self.controller.counters
        metrics = [r.metrics for r in self.responses.values()]
        assert counters.num_chunks == sum(m.num_chunks for m in metrics)
        assert counters.num_migrations == sum(m.num_migrations for m in metrics)
        assert counters.num_retries == sum(m.num_retries for m in metrics)

    # The engines' and the user's side

    def do(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if isinstance(command, Dispatch):
                self.dispatch(command.chunk)
            elif isinstance(command, Abort):
                assert self.running[command.chunk_id].chunk.instance_id == (
                    command.instance_id
                )
                self.running[command.chunk_id].aborted = True
            elif isinstance(command, Finished):
                self.finish(command.response)

    def dispatch(self, chunk: Chunk) -> None:
        assert chunk.instance_id in self.alive
        assert chunk.group_id not in self.cancelled
        assert chunk.chunk_id not in self.running
        assert chunk.max_tokens >= 1
        num_generated = len(chunk.generated) // 4
        assert chunk.generated == report_of(0, range(num_generated)).tokens
        task = self.tasks[chunk.group_id]
        assert num_generated + chunk.max_tokens <= task.max_tokens
        if task.undivided_because:
            assert (num_generated, chunk.max_tokens) == (0, task.max_tokens)
        self.running[chunk.chunk_id] = Running(chunk, self.copy_for(chunk))

    def copy_for(self, chunk: Chunk) -> ChunkId:
        """The one that could be found first of those that siblings use, or its own."""
        found = [
            (self.found_at[r.copy], r.copy)
            for r in self.running.values()
            if r.copy in self.found_at
            and (r.chunk.group_id, r.chunk.instance_id)
            == (chunk.group_id, chunk.instance_id)
        ]
        if not found or not self.alive[chunk.instance_id].shares_prompts:
            return chunk.chunk_id
        return min(found)[1]

    def num_prompt_blocks(self, chunk: Chunk) -> int:
        """That siblings share."""
        info = self.alive[chunk.instance_id]
        return (len(chunk.prompt) // 4 - 1) // 4 if info.shares_prompts else 0

    def report(self, chunk_id: ChunkId, num_tokens: int, end: str) -> ChunkProgress:
        running = self.running[chunk_id]
        tokens = running.make(num_tokens)
        if running.is_full and not end:
            end = "length"
        error = {"error": "bad luck"} if end == "error" else {}
        is_first = running.made == len(tokens) > 0
        if is_first:
            self.found_at.setdefault(running.copy, self.now)
        report = report_of(
            chunk_id,
            tokens,
            start=running.made - len(tokens),
            end=end or None,
            num_cached_tokens=0 if is_first else None,
            **error,
        )
        if end:
            del self.running[chunk_id]
            self.old.append(report)
        return report

    def finish(self, response: Response) -> None:
        assert response.request_id not in self.responses, "finished twice"
        self.responses[response.request_id] = response
        task = self.tasks[GroupId(response.group_id)]
        num_tokens = len(response.token_ids)
        assert response.token_ids == list(range(num_tokens))
        assert response.logprobs == [-t for t in range(num_tokens)]
        assert num_tokens <= task.max_tokens
        if response.finish_reason == "length":
            assert num_tokens == task.max_tokens
        if response.finish_reason == "aborted":
            assert response.group_id in self.cancelled
        if response.finish_reason == "error":
            assert response.error

    def tick(self) -> float:
        self.now += 1.0
        return self.now


ControllerMachine.TestCase.settings = settings(stateful_step_count=40)
TestControllerMachine = ControllerMachine.TestCase
