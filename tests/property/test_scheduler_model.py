"""The scheduler with its heaps decides as a naive one that sorts everything anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aseer.core.residency import Holders
from aseer.core.waiting import MAX_PASSED, Waiting
from aseer.policies import POLICIES
from aseer.scheduler import (
    MAX_GROUP_NODES,
    RECOMPUTE_TOKENS_PER_REQUEST,
    SLACK_FOR_SIBLINGS,
    Scheduler,
    chunk_tokens,
)
from aseer.types import (
    Assignment,
    GroupId,
    InstanceId,
    InstanceInfo,
    KvGroup,
    RequestId,
)
from tests.unit.builders import info_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aseer.policies import Policy

NUM_INSTANCES = 4
GROUPS = [GroupId(g) for g in "abcdefgh"]
KNOWN = GROUPS[:4]
GROUP_SIZE = 4
# Of models whose layers all keep every token, or a window, or a state.
SHAPES: list[tuple[KvGroup, ...]] = [
    (),
    (KvGroup(4), KvGroup(4, 3), KvGroup(8, 2)),
    (KvGroup(8), KvGroup(8, 2, 1)),
    (KvGroup(4, 3),),
]
MAX_TOKENS = 120


@dataclass
class NaiveInstance:
    info: InstanceInfo
    free: int
    running: int = 0


@dataclass
class NaiveScheduler:
    """What the scheduler does, said plainly: O(n log n) a decision."""

    policy: Policy
    chunk_size: int
    interval: int
    block_size: int = 1
    instances: dict[InstanceId, NaiveInstance] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)  # oldest first
    estimates: dict[GroupId, int] = field(default_factory=dict)
    homes: dict[GroupId, InstanceId] = field(default_factory=dict)
    num_homes: int = 0
    since_oldest: int = 0
    nodes: set[str] = field(default_factory=set)  # of all that were ever up
    ran_on: dict[GroupId, list[str]] = field(default_factory=dict)  # the latest last

    def schedule(
        self, holders: Mapping[RequestId, Mapping[InstanceId, int]]
    ) -> list[Assignment]:
        assigned: list[Assignment] = []
        passed: list[GroupId] = []
        held: InstanceId | None = None
        oldest_fits = True
        while len(passed) < MAX_PASSED:
            ranked = sorted(
                self.first_of_groups(passed),
                key=lambda r: self.policy.rank(r, self.estimates[r.group_id]),
            )
            is_oldest = (
                self.policy.reserves_kv  # else nothing waits for room
                and 0 < self.interval <= self.since_oldest + 1
                and oldest_fits
                and bool(self.waiting)
            )
            if not is_oldest and not ranked:
                break
            request = self.waiting[0] if is_oldest else ranked[0]
            tokens = self.tokens_of(request)
            where = self.place(request, tokens, held, holders)
            if where is not None:
                assigned.append(self.assign(request, tokens, where))
                self.since_oldest = 0 if is_oldest else self.since_oldest + 1
                continue
            if not any(self.could_take_more(i, held) for i in self.instances):
                break
            if held is None:
                held = self.freest()
            if is_oldest:
                oldest_fits = False
            else:
                passed.append(request.group_id)
        return assigned

    def first_of_groups(self, passed: list[GroupId]) -> list[Waiting]:
        by_group: dict[GroupId, list[Waiting]] = {}
        for request in self.waiting:
            if request.group_id not in passed:
                by_group.setdefault(request.group_id, []).append(request)
        return [
            min(siblings, key=lambda r: self.policy.rank(r, 0))
            for siblings in by_group.values()
        ]

    def tokens_of(self, request: Waiting) -> int:
        divided = self.policy.divided and request.divisible
        size = self.chunk_size if divided else 0
        if size and self.policy.expect is not None:
            expected = self.policy.expect(request, self.estimates[request.group_id])
            left = max(1, expected - request.num_generated)
            size = min(size, left + self.block_size - 1)
        return chunk_tokens(
            request.num_tokens, request.remaining, size, self.block_size
        )

    def could_take_more(self, i: InstanceId, held: InstanceId | None) -> bool:
        instance = self.instances[i]
        return (
            i != held
            and instance.running < instance.info.max_num_seqs
            and (instance.free > 0 or not instance.running)
        )

    def freest(self) -> InstanceId:
        return max(
            (i for i in self.instances if self.could_take_more(i, None)),
            key=lambda i: (self.instances[i].free, -i),
        )

    def place(
        self,
        request: Waiting,
        tokens: int,
        held: InstanceId | None,
        holders: Mapping[RequestId, Mapping[InstanceId, int]],
    ) -> InstanceId | None:
        def load(i: InstanceId) -> tuple[int, int, int]:
            return (self.instances[i].running, -self.instances[i].free, i)

        if not self.instances:
            return None
        if not self.policy.reserves_kv:
            return self.baseline(request, min(self.instances, key=load))
        fits = [
            i
            for i in sorted(self.instances)
            if self.could_take_more(i, held)
            and (
                not self.instances[i].running
                or self.needs(i, request.num_tokens + tokens) <= self.instances[i].free
            )
        ]
        if not fits:
            return None
        least = min(fits, key=load)
        siblings_on = self.ran_on.get(request.group_id, [])[-MAX_GROUP_NODES:]
        near = [i for i in fits if self.instances[i].info.node in siblings_on]
        if near:
            nearest = min(near, key=load)
            spread = self.instances[nearest].running - self.instances[least].running
            least = nearest if spread <= SLACK_FOR_SIBLINGS else least
        kv = holders.get(request.request_id, {})
        if not kv:
            return least
        home = max(kv, key=lambda i: (kv[i], -self.instances[i].running))
        if home not in fits:
            return least
        lost = max(0, kv[home] - kv.get(least, 0))
        spread = self.instances[home].running - self.instances[least].running
        return least if spread > 1 + lost // RECOMPUTE_TOKENS_PER_REQUEST else home

    def baseline(self, request: Waiting, least: InstanceId) -> InstanceId:
        if self.policy.placement == "least-loaded":
            return least
        home = self.homes.get(request.group_id)
        if home not in self.instances:
            alive = sorted(self.instances)
            in_turn = alive[self.num_homes % len(alive)]
            round_robin = self.policy.placement == "group-round-robin"
            home = in_turn if round_robin else least
            self.homes[request.group_id] = home
            self.num_homes += 1
        return home

    def needs(self, i: InstanceId, num_tokens: int) -> int:
        info = self.instances[i].info
        num_written = num_tokens - 1 + info.num_lookahead_tokens
        if not info.kv_groups:
            return -(-num_written // info.block_size)
        needs = 0
        for size, most, extra in info.kv_groups:
            filled = -(-num_written // size)
            needs += extra + (filled if most is None or filled < most else most)
        return needs

    def assign(self, request: Waiting, tokens: int, where: InstanceId) -> Assignment:
        instance = self.instances[where]
        blocks = 0
        if self.policy.reserves_kv:
            needs = self.needs(where, request.num_tokens + tokens)
            blocks = min(needs, instance.info.num_kv_blocks)
            if len(self.nodes) > 1:
                ran_on = self.ran_on.setdefault(request.group_id, [])
                if instance.info.node in ran_on:
                    ran_on.remove(instance.info.node)
                ran_on.append(instance.info.node)
        instance.free -= blocks
        instance.running += 1
        self.waiting.remove(request)
        return Assignment(request.request_id, where, tokens, blocks)


class SchedulersAgree(RuleBasedStateMachine):
    """The same events to both; the same assignments from both."""

    @initialize(
        policy=st.sampled_from(list(POLICIES.values())),
        chunk_size=st.sampled_from([0, 8, 16]),
        interval=st.sampled_from([0, 1, 3]),
        uniform=st.booleans(),
        groups=st.sampled_from(SHAPES),
        num_nodes=st.integers(1, NUM_INSTANCES),
    )
    def begin(
        self,
        policy: Policy,
        chunk_size: int,
        interval: int,
        uniform: bool,
        groups: tuple[KvGroup, ...],
        num_nodes: int,
    ) -> None:
        self.num_nodes = num_nodes
        self.uniform = uniform
        self.groups = groups
        self.policy = policy
        self.real = Scheduler(
            policy, chunk_size=chunk_size, starvation_interval=interval
        )
        self.naive = NaiveScheduler(policy, chunk_size, interval)
        self.running: dict[RequestId, tuple[Waiting, Assignment]] = {}
        self.finished: set[RequestId] = set()
        self.holders: dict[RequestId, dict[InstanceId, int]] = {}

    @rule(
        i=st.integers(0, NUM_INSTANCES - 1),
        num_kv_blocks=st.integers(5, 60),
        max_num_seqs=st.integers(1, 6),
        block_size=st.sampled_from([2, 4, 8]),
        lookahead=st.integers(0, 3),
        groups=st.sampled_from(SHAPES),
    )
    def instance_up(
        self,
        i: int,
        num_kv_blocks: int,
        max_num_seqs: int,
        block_size: int,
        lookahead: int,
        groups: tuple[KvGroup, ...],
    ) -> None:
        if InstanceId(i) in self.naive.instances:
            return
        info = info_of(
            i,
            num_kv_blocks=num_kv_blocks,
            max_num_seqs=max_num_seqs,
            block_size=4 if self.uniform else block_size,
            num_lookahead_tokens=1 if self.uniform else lookahead,
            kv_groups=self.groups if self.uniform else groups,
            node=str(i % self.num_nodes),
        )
        self.naive.nodes.add(info.node)
        self.real.fleet.add(info)
        self.naive.instances[info.instance_id] = NaiveInstance(info, num_kv_blocks)
        self.naive.block_size = info.block_size
        self.schedule()

    @rule(i=st.integers(0, NUM_INSTANCES - 1))
    def instance_down(self, i: int) -> None:
        instance_id = InstanceId(i)
        if self.naive.instances.pop(instance_id, None) is None:
            return
        self.real.fleet.remove(instance_id)
        for kv in self.holders.values():
            kv.pop(instance_id, None)
        for request_id, (request, assignment) in list(self.running.items()):
            if assignment.instance_id == instance_id:
                del self.running[request_id]
                self.wait(request)
        self.schedule()

    @rule(
        group=st.sampled_from(GROUPS),
        index=st.integers(0, GROUP_SIZE - 1),
        num_prompt_tokens=st.sampled_from([1, 4, 40]),
        divisible=st.booleans(),
        known_length=st.integers(1, MAX_TOKENS),
        more=st.booleans(),
    )
    def request_comes(
        self,
        group: GroupId,
        index: int,
        num_prompt_tokens: int,
        divisible: bool,
        known_length: int,
        more: bool,
    ) -> None:
        request_id = RequestId(f"{group}/{index}")
        if request_id in self.real or request_id in self.running | dict.fromkeys(
            self.finished
        ):
            return
        self.naive.estimates.setdefault(group, MAX_TOKENS)
        self.wait(
            Waiting(
                request_id=request_id,
                group_id=group,
                arrival=GROUPS.index(group) * GROUP_SIZE + index,
                is_probe=index == 0,
                num_tokens=num_prompt_tokens,
                num_generated=0,
                remaining=MAX_TOKENS,
                divisible=divisible,
                # Of all members of a group, or of none.
                known_length=known_length if group in KNOWN else None,
                is_new=True,
            )
        )
        if not more:
            self.schedule()

    @rule(pick=st.integers(0, 1000), num_new=st.integers(0, 16), more=st.booleans())
    def chunk_ends(self, pick: int, num_new: int, more: bool) -> None:
        if not self.running:
            return
        request_id = sorted(self.running)[pick % len(self.running)]
        request, assignment = self.running.pop(request_id)
        self.release(assignment)
        num_new = min(num_new, request.remaining - 1)
        request = request._replace(
            num_tokens=request.num_tokens + num_new,
            num_generated=request.num_generated + num_new,
            remaining=request.remaining - num_new,
            is_new=request.num_generated + num_new < 16,
        )
        kv = self.holders.setdefault(request_id, {})
        kv[assignment.instance_id] = 64 * num_new
        self.wait(request)
        if not more:
            self.schedule()

    @rule(pick=st.integers(0, 1000), length=st.integers(1, MAX_TOKENS))
    def request_finishes(self, pick: int, length: int) -> None:
        if not self.running:
            return
        request_id = sorted(self.running)[pick % len(self.running)]
        request, assignment = self.running.pop(request_id)
        self.finished.add(request_id)
        self.release(assignment)
        self.naive.estimates[request.group_id] = length
        self.real.set_length_estimate(request.group_id, length)
        self.schedule()

    @rule(alike=st.booleans())
    def siblings_compared(self, alike: bool) -> None:
        self.real.set_siblings_alike(alike=alike)
        self.naive.policy = self.policy
        if not alike and self.policy.if_unlike is not None:
            self.naive.policy = self.policy.if_unlike
        self.schedule()

    @rule(group=st.sampled_from(GROUPS))
    def group_cancelled(self, group: GroupId) -> None:
        self.real.remove_group(group)
        for request in [r for r in self.naive.waiting if r.group_id == group]:
            self.naive.waiting.remove(request)
            self.finished.add(request.request_id)
        self.schedule()

    def wait(self, request: Waiting) -> None:
        if request.group_id in self.naive.estimates:
            self.naive.waiting.append(request)
            self.real.add(request, self.naive.estimates[request.group_id])

    def release(self, assignment: Assignment) -> None:
        where = assignment.instance_id
        self.real.fleet.release(where, assignment.num_reserved_blocks)
        self.naive.instances[where].free += assignment.num_reserved_blocks
        self.naive.instances[where].running -= 1

    def schedule(self) -> None:
        waiting = {r.request_id: r for r in self.naive.waiting}
        expected = self.naive.schedule(self.holders)
        assignments = self.real.schedule(lambda r: Holders(self.holders.get(r, {})))
        assert assignments == expected
        for assignment in assignments:
            request = waiting[assignment.request_id]
            self.running[assignment.request_id] = (request, assignment)

    @invariant()
    def the_same_requests_wait(self) -> None:
        if hasattr(self, "real"):
            assert len(self.real) == len(self.naive.waiting)
            assert all(r.request_id in self.real for r in self.naive.waiting)

    @invariant()
    def capacity_is_the_same_and_never_exceeded(self) -> None:
        if hasattr(self, "real"):
            for i, instance in self.naive.instances.items():
                assert self.real.fleet.num_free_blocks(i) == instance.free >= 0
                assert self.real.fleet.num_running(i) == instance.running


SchedulersAgree.TestCase.settings = settings(stateful_step_count=40)
TestSchedulersAgree = SchedulersAgree.TestCase
