"""The chunks that run, by instance: how many, whose is the longest, where that changed.

What is asked a few times a second must not look at every chunk: each instance's longest
request is kept as reports come in, and looked for anew (among its own chunks, at most
`max_num_seqs`) only if it no longer runs there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aseer.buffer import Request
    from aseer.types import ChunkId, InstanceId


class _Instance:
    """One instance's chunks.

    Attributes:
        longest: the request with the most tokens, as far as is known; None = to be
            looked for.
    """

    __slots__ = ("chunks", "longest")

    def __init__(self) -> None:
        self.chunks: dict[ChunkId, Request] = {}
        self.longest: Request | None = None


class RunningChunks:
    """Requests by the chunk they run, and that by instance."""

    def __init__(self) -> None:
        self._instances: dict[InstanceId, _Instance] = {}
        self._touched: set[InstanceId] = set()

    def __contains__(self, instance_id: InstanceId) -> bool:
        return instance_id in self._instances

    def __iter__(self) -> Iterator[InstanceId]:
        return iter(self._instances)

    def add_instance(self, instance_id: InstanceId) -> None:
        """It runs nothing yet."""
        self._instances[instance_id] = _Instance()

    def drop_instance(self, instance_id: InstanceId) -> list[ChunkId]:
        """It is gone; the chunks that ran there."""
        self._touched.add(instance_id)
        return list(self._instances.pop(instance_id).chunks)

    def on(self, instance_id: InstanceId) -> list[Request]:
        """The requests that run on an instance; none if it is gone."""
        instance = self._instances.get(instance_id)
        return [] if instance is None else list(instance.chunks.values())

    def num_on(self, instance_id: InstanceId) -> int:
        """How many they are."""
        instance = self._instances.get(instance_id)
        return 0 if instance is None else len(instance.chunks)

    def start(
        self, instance_id: InstanceId, chunk_id: ChunkId, request: Request
    ) -> None:
        """A chunk was dispatched."""
        instance = self._instances[instance_id]
        if not instance.chunks:
            self._touched.add(instance_id)
            instance.longest = request
        instance.chunks[chunk_id] = request
        longest = instance.longest
        if longest is not None and len(request.tokens) > len(longest.tokens):
            instance.longest = request

    def grew(self, requests: Iterable[Request]) -> None:
        """Requests that ran have more tokens, maybe; some may run no more."""
        where: InstanceId | None = None
        instance: _Instance | None = None
        for request in requests:
            chunk = request.chunk
            if chunk is None:
                continue
            if chunk.instance_id != where:
                where = chunk.instance_id
                instance = self._instances[where]
            assert instance is not None
            longest = instance.longest
            if longest is not None and len(request.tokens) > len(longest.tokens):
                instance.longest = request

    def end(self, instance_id: InstanceId, chunk_id: ChunkId) -> None:
        """A chunk is over."""
        instance = self._instances[instance_id]
        if instance.chunks.pop(chunk_id) is instance.longest:
            instance.longest = None
        if not instance.chunks:
            self._touched.add(instance_id)

    def take_touched(self) -> set[InstanceId]:
        """Instances that began or ceased to have chunks since the last call.

        One caller may ask, a rollout's recorder: of two, each would see a part.
        """
        touched, self._touched = self._touched, set()
        return touched

    def longest(self) -> Request | None:
        """The request with the most tokens."""
        longest: Request | None = None
        for instance in self._instances.values():
            if instance.longest is None and instance.chunks:
                instance.longest = max(instance.chunks.values(), key=_num_tokens)
            here = instance.longest
            if here is not None and (
                longest is None or len(here.tokens) > len(longest.tokens)
            ):
                longest = here
        return longest

    def check_integrity(self) -> None:
        """Assert that the longest is; changes nothing."""
        for instance in self._instances.values():
            longest, requests = instance.longest, instance.chunks.values()
            if longest is not None:
                assert longest in requests
                assert len(longest.tokens) == max(map(_num_tokens, requests))
            assert all(r.chunk is not None for r in requests)


def _num_tokens(request: Request) -> int:
    return len(request.tokens)
