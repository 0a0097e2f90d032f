"""What follows a rollout without deciding in it: drafts, the KV pool, length priors.

Each is told by the session of what happened, and reads the controller; none changes it.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

from aseer.kv.images import pool_tokens
from aseer.kv.sharing import PromptSharing, num_alike
from aseer.types import GroupId, RequestId, request_id_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Mapping

    from aseer.context import LengthPriors
    from aseer.controller import Controller
    from aseer.counts import KvCounts
    from aseer.dgds.server import DraftServer
    from aseer.kv.messages import Pulled
    from aseer.runtime.kv_pools import KvPools
    from aseer.runtime.recorder import Recorder
    from aseer.types import Chunk, InstanceInfo, Past, Response, Task

# Requests whose KV is fetched from the disk ahead, for each instance: the one that is
# next and one more, as a fetch takes about as long as a chunk's first steps.
_PREFETCHES_PER_INSTANCE = 2


class Followers:
    """All that follow one rollout, as far as the engine has them."""

    def __init__(
        self,
        controller: Controller,
        *,
        weight_version: int,
        rollout_id: int,
        draft_server: DraftServer | None,
        kv_pool: KvPools | None,
        priors: LengthPriors | None,
    ) -> None:
        self._controller = controller
        self._priors = priors
        self._drafts: DraftFeed | None = None
        self._kv: KvUpkeep | None = None
        if draft_server is not None:
            draft_server.set_weight_version(weight_version)
            self._drafts = DraftFeed(draft_server, controller, rollout_id)
        if kv_pool is not None:
            controller.use_pool(kv_pool.granularity, kv_pool.server_of)
            self._kv = KvUpkeep(kv_pool, controller, weight_version)

    def prepared(self, tasks: list[Task]) -> list[Task]:
        """Groups with what is known of them before they come."""
        return tasks if self._priors is None else with_priors(self._priors, tasks)

    def added(
        self, tasks: list[Task], past: Mapping[GroupId, Mapping[int, Past]]
    ) -> None:
        """The controller has groups, and what they had in an earlier run."""
        if self._kv is not None:
            self._kv.groups_added(tasks)
        if self._drafts is not None:
            self._drafts.restored(past)

    def dispatched(self, chunk: Chunk) -> asyncio.Future[Pulled] | None:
        """The controller has started a chunk; what it is to wait for, if anything."""
        if self._drafts is not None:
            self._drafts.dispatched(chunk)
        return None if self._kv is None else self._kv.dispatched(chunk)

    def progressed(self, recorder: Recorder) -> None:
        """The rollout's sums were made anew, a few times a second."""
        info = recorder.any_instance()
        if self._kv is not None and info is not None:
            self._kv.progressed(recorder.kv_counts, info)

    def finished(self, response: Response, info: InstanceInfo | None) -> None:
        """A request is over; see `KvUpkeep.finished`."""
        group_id = GroupId(response.group_id)
        if self._kv is not None:
            self._kv.finished(response, info)
        if self._controller.is_group_finished(group_id):
            if self._drafts is not None:
                self._drafts.group_finished(group_id)
            if self._priors is not None:
                learn_length(self._priors, self._controller, group_id)


class DraftFeed:
    """Tells the draft server what a rollout's requests have written."""

    def __init__(
        self, server: DraftServer, controller: Controller, rollout_id: int
    ) -> None:
        self._server = server
        self._controller = controller
        self._prefix = f"{rollout_id}:"  # groups of other rollouts may have equal ids

    def dispatched(self, chunk: Chunk) -> None:
        """Let siblings draft from what a request generates from its first chunk on."""
        request = self._controller.buffer[chunk.request_id]
        if len(request.instances) == 1:
            group, name = self._prefix + chunk.group_id, self._prefix + chunk.request_id
            self._server.follow(group, name, *request.source)

    def restored(self, past: Mapping[GroupId, Mapping[int, Past]]) -> None:
        """Let siblings draft from what requests had in an earlier run."""
        for group_id, requests in past.items():
            if self._controller.is_group_finished(group_id):
                continue
            group = self._prefix + group_id
            for index, had in requests.items():
                request = self._prefix + request_id_of(group_id, index)
                self._server.update_cst(group, request, 0, had.tokens)

    def group_finished(self, group_id: GroupId) -> None:
        """Its requests need no more drafts."""
        self._server.finish_group(self._prefix + group_id)


class KvUpkeep:
    """Frees a rollout's KV in the pools, and has them load what is wanted next."""

    def __init__(
        self, pool: KvPools, controller: Controller, weight_version: int
    ) -> None:
        self._pool = pool
        self._controller = controller
        self._weight_version = weight_version
        self._sharing = PromptSharing(pool.granularity)
        self._prefetched: dict[RequestId, int] = {}  # at how many tokens
        self._compute_token_s: float | None = None

    def dispatched(self, chunk: Chunk) -> asyncio.Future[Pulled] | None:
        """A chunk was started; what brings its KV from another node, if anything."""
        request = self._controller.buffer[chunk.request_id]
        *_, before, here = (chunk.instance_id, *request.instances)
        if before == here:
            return None
        group = request.group
        tokens = pool_tokens(group.prompt, group.images) + request.generated
        info = self._controller.scheduler.fleet.info(here)
        return self._pool.pull(
            info, self._weight_version, tokens, before, self._compute_token_s
        )

    def progressed(self, counts: KvCounts, info: InstanceInfo) -> None:
        """The engines' sums were made anew.

        Args:
            info: of any instance.
        """
        compute_s = self._compute_token_s = counts.compute_token_s
        pull_s, far = self._pool.pull_token_s(), None
        if pull_s is not None and compute_s:
            far = min(1.0, pull_s / compute_s)
        self._controller.set_move_price(counts.move_price, far)
        self._prefetch(info)

    def groups_added(self, tasks: Iterable[Task]) -> None:
        """Their prompts may begin like others'."""
        for task in tasks:
            prompt = pool_tokens(task.prompt, task.images)
            self._sharing.add(task.group_id, prompt)

    def finished(self, response: Response, info: InstanceInfo | None) -> None:
        """Nobody will ask for a request's KV, but for what others begin with.

        Args:
            info: of an instance that takes part; None if none does.
        """
        self._prefetched.pop(RequestId(response.request_id), None)
        group_id = GroupId(response.group_id)
        siblings = self._controller.buffer.group(group_id)
        running = [array("i", r.generated) for r in siblings if not r.state.is_finished]
        if not running:
            self._sharing.remove(group_id)
        if info is None:
            return
        prompt = array("i", response.prompt_token_ids)
        if siblings and siblings[0].group.images:
            group = siblings[0].group
            prompt = array("i", pool_tokens(group.prompt, group.images))
        generated = array("i", response.token_ids)
        tokens = (prompt + generated).tobytes()
        start = len(prompt) + num_alike(generated, running) if running else 0
        start = max(start, self._sharing.num_shared(group_id, tokens))
        instances = {i for request in siblings for i in request.instances}
        self._pool.free(info, self._weight_version, tokens, start, instances)

    def _prefetch(self, info: InstanceInfo) -> None:
        """Tell the pool whose KV will be wanted next, where it has to fetch it."""
        if not self._pool.prefetches:
            return
        num = _PREFETCHES_PER_INSTANCE * len(self._controller.scheduler.fleet)
        for request in self._controller.upcoming(num):
            num_tokens = request.num_tokens
            if self._prefetched.get(request.request_id) != num_tokens:
                self._prefetched[request.request_id] = num_tokens
                group = request.group
                tokens = pool_tokens(group.prompt, group.images) + request.generated
                last = request.instances[-1:]
                self._pool.prefetch(info, self._weight_version, tokens, last)


def with_priors(priors: LengthPriors, tasks: Iterable[Task]) -> list[Task]:
    """Groups with what an earlier rollout has shown of their prompts."""
    return [replace(task, length_prior=priors.get(task.prompt_key)) for task in tasks]


def learn_length(
    priors: LengthPriors, controller: Controller, group_id: GroupId
) -> None:
    """Keep what a finished group shows for its prompt's next rollout."""
    longest = controller.context.longest(group_id)
    if longest is not None:
        priors.learn(controller.buffer.group(group_id)[0].group.prompt_key, longest)
