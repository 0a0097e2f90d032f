from collections.abc import Callable, Mapping
from typing import Final

from aseer.types import GroupId, InstanceId, InstanceInfo, RequestId
from aseer.waiting import Rank, Waiting

MAX_PASSED: Final[int]
"""Groups passed over in a round until it ends."""
DEFAULT_MOVE_PRICE: Final[float]
"""What loading a token from a pool costs, as a share of computing it."""

class WaitingQueue:
    """Waiting requests by rank and by age."""

    def __init__(self, rank: Callable[[Waiting, int], Rank]) -> None:
        """Start empty; lowest `rank(request, length estimate of its group)` first.

        Siblings rank among each other as if their estimate were 0. No two requests rank
        the same.
        """

    def __len__(self) -> int: ...
    def __contains__(self, request_id: RequestId) -> bool: ...
    @property
    def num_passed(self) -> int:
        """Groups passed over in this round."""

    def add(self, request: Waiting, length_estimate: int) -> None:
        """Take a request that waits.

        Raises:
            ValueError: it waits already.
        """

    def set_length_estimate(self, group_id: GroupId, length_estimate: int) -> None:
        """Re-rank a group whose estimate changed."""

    def set_rank(self, rank: Callable[[Waiting, int], Rank]) -> None:
        """Order by another rank from now on."""

    def length_estimate(self, group_id: GroupId) -> int:
        """Of a group of which something waits.

        Raises:
            KeyError: nothing does.
        """

    def remove(self, request: Waiting) -> None:
        """A request waits no more.

        Raises:
            KeyError: it does not wait.
        """

    def remove_group(self, group_id: GroupId) -> None:
        """Drop a group and its waiting requests."""

    def oldest(self) -> Waiting | None:
        """The request that has waited longest."""

    def head(self, num_groups: int) -> list[Waiting]:
        """The first request of each of the first groups, in order."""

    def begin_round(self) -> None:
        """Nothing is passed over yet."""

    def first(self, room: int) -> Waiting | None:
        """The first request of the first group that this round has not passed over.

        Args:
            room: groups whose first is known to need more tokens are passed over.
        """

    def pass_over(self, needs: int) -> None:
        """What `first` gave does not fit: it needs room for that many tokens."""

class Fleet:
    """Instances by id, what each has free, and a selection among them."""

    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    @property
    def block_size(self) -> int:
        """Tokens a KV block holds, on the instance that came last."""

    @property
    def num_lookahead_tokens(self) -> int:
        """Slots past a request's last token, on the instance that came last."""

    def info(self, instance_id: InstanceId) -> InstanceInfo:
        """What the instance said of itself."""

    def alive_ids(self) -> list[InstanceId]:
        """Ids of the instances that can take work, ascending."""

    def add(self, info: InstanceInfo) -> None:
        """An instance came up (or came back), with nothing running.

        Raises:
            ValueError: it is up already.
        """

    def remove(self, instance_id: InstanceId) -> None:
        """The instance is gone, and all that ran there with it."""

    def reserve(
        self, instance_id: InstanceId, num_tokens: int, num_shared_blocks: int = 0
    ) -> int:
        """Take a place for a chunk that writes `num_tokens` tokens' KV (0 = none).

        Args:
            num_shared_blocks: of them that are reserved already.

        Returns:
            The reserved KV blocks, to be given back by `release`.
        """

    def release(self, instance_id: InstanceId, num_blocks: int) -> None:
        """Give back what a chunk reserved; nothing to do if the instance is gone."""

    def num_running(self, instance_id: InstanceId) -> int:
        """Chunks placed there that have not ended."""

    def num_free_blocks(self, instance_id: InstanceId) -> int:
        """KV blocks no chunk has reserved."""

    def most_tokens(self) -> int:
        """A bound: no instance has room for a chunk that ends with more tokens."""

    def select(self, num_tokens: int) -> bool:
        """Candidates: instances with room for a chunk ending with that many tokens.

        Returns:
            Whether there is one.
        """

    def fits(self, instance_id: InstanceId, num_tokens: int) -> bool:
        """Whether an instance has room for a chunk that writes so many tokens' KV."""

    def select_alive(self) -> bool:
        """Candidates: every instance that is up; False if there is none."""

    def is_selected(self, instance_id: InstanceId) -> bool:
        """Whether the last selection holds the instance."""

    def least_loaded(self) -> InstanceId:
        """The candidate running the fewest requests, then with the most free KV.

        Raises:
            ValueError: there is no candidate.
        """

    def hold_none(self) -> None:
        """Let every instance be a candidate again."""

    def hold_freest(self) -> bool:
        """Keep the instance with the most room out of what follows, unless one is kept.

        Returns:
            Whether one is kept now that was not before.
        """

class KvResidency:
    """Tokens of waiting requests that each instance's prefix cache probably holds."""

    move_price: float

    def __init__(self) -> None: ...
    def use_pool(self, granularity: int, pool_of: Callable[[InstanceId], int]) -> None:
        """What is computed from now on is in a pool, too.

        Args:
            granularity: tokens found together.
            pool_of: tells instances of different pools apart.
        """

    def add_instance(
        self, instance_id: InstanceId, num_blocks: int, block_size: int
    ) -> None:
        """An empty cache, also for an instance that came back."""

    def drop_instance(self, instance_id: InstanceId) -> None:
        """Forget an instance that is gone."""

    def holders(self, request_id: RequestId) -> Mapping[InstanceId, int]:
        """Tokens of the request by instance that holds some.

        A token in a pool counts as held by the pool's instances, less its price.
        """

    def reserve(
        self, instance_id: InstanceId, request_id: RequestId, num_blocks: int
    ) -> None:
        """A chunk starts: its own cached blocks are used, others' pushed out."""

    def release(
        self,
        instance_id: InstanceId,
        request_id: RequestId,
        num_blocks: int,
        num_tokens: int,
    ) -> None:
        """A chunk ended with `num_tokens` tokens computed; 0 = the request is
        finished.
        """

    def forget(self, request_id: RequestId) -> None:
        """The request is finished: nobody will ask for its KV."""
