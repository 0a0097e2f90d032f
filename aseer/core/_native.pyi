"""Order, capacity and prefix caches in C++: handles and numbers, no Python objects.

`waiting`, `fleet`, `outputs` and `residency`, beside it, are what is used. A handle
that is not open, or any other argument that cannot be meant, is a ValueError (an
instance that was never added a KeyError), and nothing has changed.
"""

from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from aseer.core.waiting import Rank
from aseer.types import InstanceId

MAX_PASSED: Final[int]
"""Groups passed over in a round until it ends."""
DEFAULT_MOVE_PRICE: Final[float]
"""What loading a token from a pool costs, as a share of computing it."""

T = TypeVar("T")

def untracked(value: T) -> T:
    """Exclude an object from Python's cyclic garbage collection, and return it.

    For numerous objects that are in no reference cycle, or only in one that is broken
    by hand: a full collection stops every thread of the process for a second if it has
    to traverse a million objects. A cycle through an untracked object is never freed.
    Before Python 3.14 a dict is tracked again when an object that can be is put into
    it.
    """

class WaitingOrders:
    """Waiting requests by rank, in one or two orders, and by age."""

    def __init__(self, num_orders: int) -> None: ...
    def __len__(self) -> int: ...
    @property
    def num_groups(self) -> int:
        """Groups of which something waits."""

    @property
    def num_passed(self) -> int:
        """Groups passed over in this round."""

    def add(self, group: int, own: list[Rank], lead: list[Rank]) -> tuple[int, int]:
        """Take a request that waits.

        Args:
            group: its group's handle; -1 = none of the group waits.
            own: by order, its rank among its siblings.
            lead: by order, its group's rank while it is the first of it.

        Returns:
            The request's handle and its group's.
        """

    def set_leads(self, group: int, leads: dict[int, list[Rank]]) -> None:
        """Members of a group have other ranks in it now, by order."""

    def remove(self, request: int) -> bool:
        """A request waits no more; whether its group's handle is closed with it."""

    def members(self, group: int) -> list[int]:
        """Its waiting requests, the first of the first order last."""

    def remove_group(self, group: int) -> None:
        """Drop a group and its waiting requests."""

    def choose(self, order: int) -> None:
        """Read that order from now on."""

    def oldest(self) -> int:
        """The request that has waited longest; -1 = none waits."""

    def head(self, num_groups: int) -> list[int]:
        """The first request of each of the first groups, in order."""

    def begin_round(self) -> None:
        """Nothing is passed over yet."""

    def first(self, room: int) -> int:
        """The first request of the first group that this round has not passed over.

        Args:
            room: groups whose first is known to need more tokens are passed over.

        Returns:
            Its handle; -1 = none is left.
        """

    def pass_over(self, needs: int) -> None:
        """What `first` gave does not fit: it needs room for that many tokens."""

class Capacity:
    """Instances by id, what each has free, and a selection among them."""

    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    @property
    def block_size(self) -> int:
        """Tokens a KV block holds, on the instance that came last."""

    @property
    def num_lookahead_tokens(self) -> int:
        """Slots past a request's last token, on the instance that came last."""

    def alive_ids(self) -> list[InstanceId]:
        """Ids of the instances that can take work, ascending."""

    def add_instance(
        self,
        instance_id: InstanceId,
        *,
        pool: int,
        node: int,
        num_kv_blocks: int,
        block_size: int,
        num_lookahead_tokens: int,
        max_num_seqs: int,
        kv_groups: list[tuple[int, int, int]],
    ) -> None:
        """An instance came up (or came back), with nothing running.

        Args:
            kv_groups: block size, most blocks (-1 = no limit) and extra blocks of each
                of the model's groups; empty = one that keeps all tokens.
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

    def pool_of(self, instance_id: InstanceId) -> int:
        """Instances of the same pool share KV; -1 = it has none."""

    def node_of(self, instance_id: InstanceId) -> int:
        """Number of the host that it runs on."""

    def set_pool(self, instance_id: InstanceId, pool: int) -> None:
        """It has a share in another pool."""

    def most_tokens(self) -> int:
        """A bound: no instance has room for a chunk that ends with more tokens."""

    def select(self, num_tokens: int) -> bool:
        """Candidates: instances with room for a chunk ending with that many tokens.

        Returns:
            Whether there is one.
        """

    def fits(
        self, instance_id: InstanceId, num_tokens: int, num_shared_blocks: int = 0
    ) -> bool:
        """Whether an instance has room for a chunk that writes so many tokens' KV.

        Args:
            num_shared_blocks: of its blocks that are reserved already.
        """

    def select_alive(self) -> bool:
        """Candidates: every instance that is up; False if there is none."""

    def is_selected(self, instance_id: InstanceId) -> bool:
        """Whether the last selection holds the instance."""

    def least_loaded(self, nodes: Sequence[int] = (), slack: int = 0) -> InstanceId:
        """The candidate running the fewest requests, then with the most free KV.

        Args:
            nodes: the best of these is taken if it runs at most `slack` requests more
                than the best of all.

        Raises:
            ValueError: there is no candidate.
        """

    def least_loaded_of(self, pool: int, node: int = 0) -> InstanceId:
        """The same among a pool's instances on a node; -1 = none is a candidate."""

    def hold_none(self) -> None:
        """Let every instance be a candidate again."""

    def hold_freest(self) -> bool:
        """Keep the instance with the most room out of what follows, unless one is kept.

        Returns:
            Whether one is kept now that was not before.
        """

class Outputs:
    """What requests have generated, and the chunks that add to it."""

    def __init__(self, *, keeps_values: bool = True) -> None:
        """False: tokens are only counted, and text is dropped."""

    def __len__(self) -> int:
        """Requests that are open."""

    @property
    def num_running(self) -> int:
        """Chunks that run."""

    def open(self) -> int:
        """A request that has generated nothing yet."""

    def close(self, request: int) -> None:
        """Drop a request and what it generated; none of its chunks may run."""

    def clear(self, request: int) -> None:
        """Drop what a request generated; none of its chunks may run."""

    def share(self, request: int) -> None:
        """Keep a request's tokens, also beyond its close, for a `TokenLog`."""

    def num_tokens(self, request: int) -> int:
        """How many a request has generated."""

    def tokens(self, request: int) -> bytes:
        """A request's, int32; zeros if they are only counted."""

    def logprobs(self, request: int) -> bytes:
        """One a token, float32; zeros if they are only counted."""

    def text(self, request: int) -> bytes:
        """A request's, UTF-8 as the instance sent it."""

    def begin(self, chunk_id: int, request: int, max_tokens: int) -> None:
        """A request's next chunk runs; no other of that request does."""

    def end(self, chunk_id: int) -> None:
        """A chunk is over; nothing to do if it was before."""

    def take(
        self,
        chunk_ids: bytes,
        starts: bytes,
        counts: bytes,
        tokens: bytes,
        logprobs: bytes,
        text_starts: bytes,
        text_counts: bytes,
        text: bytes,
        over: list[int],
    ) -> tuple[int, list[int]]:
        """Append what of a report is new; chunks that do not run are passed over.

        Args:
            over: places of the chunks that are over with it; they end here.

        The others are `aseer.core.columns.Columns`.

        Returns:
            Tokens appended, and the places of the chunks whose part was refused,
            ascending.
        """

    def longest_running(self) -> tuple[int, int]:
        """The chunk whose request has the most tokens, and how many; -1 = none runs."""

class TokenLog:
    """What groups have generated, for engines that draft from it."""

    def __init__(self) -> None: ...
    def __len__(self) -> int:
        """Groups."""

    def __contains__(self, group: str) -> bool: ...
    def follow(
        self, group: str, request: str, outputs: Outputs, handle: int, now: float
    ) -> None:
        """A text is what a request generates; `outputs` share it."""

    def append(
        self, group: str, request: str, start: int, tokens: bytes, now: float
    ) -> None:
        """Append to a text of the log's own; what would leave a gap is ignored."""

    def register(self, group: str, prompt_key: bytes, ttl_s: float, now: float) -> bool:
        """Give a group its prompt's key and its ttl; False if there is no such
        group.
        """

    def fetch(self, counts: bytes, now: float) -> bytes:
        """What each group has beyond what an engine says it has.

        Args:
            counts: `FetchCst.cache_infos`, in MessagePack.

        Returns:
            `Deltas`, in MessagePack.

        Raises:
            ValueError: the counts are malformed.
        """

    def finish(self, group: str) -> tuple[bytes, dict[str, bytes]]:
        """Forget a group; its prompt's key and its texts, without those that are
        empty.
        """

    def expire(self, now: float) -> None:
        """Forget the groups whose ttl is over."""

class PrefixCaches:
    """Tokens of waiting requests that each instance's prefix cache probably holds."""

    move_price: float
    """What loading a token from a pool costs on the node that stored it, as a share of
    computing it: 0 to 1."""
    node_price: float
    """The same on other nodes."""

    def __init__(self) -> None: ...
    def set_granularity(self, granularity: int) -> None:
        """Tokens that a pool finds together; 0 = there is no pool."""

    def add_instance(
        self,
        instance_id: InstanceId,
        *,
        num_blocks: int,
        block_size: int,
        pool: int,
        node: int,
    ) -> None:
        """An empty cache, also for an instance that came back."""

    def set_pool(self, instance_id: InstanceId, pool: int) -> None:
        """Instances of the same pool share what is computed from now on."""

    def drop_instance(self, instance_id: InstanceId) -> None:
        """Forget an instance that is gone."""

    def open(self) -> int:
        """A request of which nothing is held yet."""

    def close(self, request: int) -> None:
        """Nobody will ask for its KV."""

    def holders(
        self, request: int
    ) -> tuple[Mapping[InstanceId, int], int, int, int, int]:
        """What `aseer.core.residency.Holders` consists of."""

    def reserve(self, instance_id: InstanceId, request: int, num_blocks: int) -> None:
        """A chunk starts; -1 = of a request that has not been opened."""

    def release(
        self, instance_id: InstanceId, request: int, num_blocks: int, num_tokens: int
    ) -> None:
        """A chunk ended with `num_tokens` tokens computed."""
