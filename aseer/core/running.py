"""The chunks that run, by instance: how many, and where that changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.core._native import untracked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aseer.buffer import Request
    from aseer.types import ChunkId, InstanceId


class RunningChunks:
    """Requests by the chunk they run, and that by instance."""

    def __init__(self) -> None:
        self._instances: dict[InstanceId, dict[ChunkId, Request]] = {}
        self._touched: set[InstanceId] = set()

    def __contains__(self, instance_id: InstanceId) -> bool:
        return instance_id in self._instances

    def __iter__(self) -> Iterator[InstanceId]:
        return iter(self._instances)

    def add_instance(self, instance_id: InstanceId) -> None:
        """It runs nothing yet."""
        self._instances[instance_id] = {}

    def drop_instance(self, instance_id: InstanceId) -> list[Request]:
        """It is gone; the requests that ran there."""
        self._touched.add(instance_id)
        return list(self._instances.pop(instance_id).values())

    def on(self, instance_id: InstanceId) -> list[Request]:
        """The requests that run on an instance; none if it is gone."""
        return list(self._instances.get(instance_id, {}).values())

    def chunks_on(self, instance_id: InstanceId) -> list[ChunkId]:
        """Their chunks."""
        return [r.chunk.chunk_id for r in self.on(instance_id) if r.chunk is not None]

    def num_on(self, instance_id: InstanceId) -> int:
        """How many they are."""
        return len(self._instances.get(instance_id, ()))

    def start(
        self, instance_id: InstanceId, chunk_id: ChunkId, request: Request
    ) -> None:
        """A chunk was dispatched."""
        chunks = self._instances[instance_id]
        if not chunks:
            self._touched.add(instance_id)
        chunks[chunk_id] = request
        untracked(chunks)

    def end(self, instance_id: InstanceId, chunk_id: ChunkId) -> None:
        """A chunk is over."""
        chunks = self._instances[instance_id]
        del chunks[chunk_id]
        if not chunks:
            self._touched.add(instance_id)

    def take_touched(self) -> set[InstanceId]:
        """Instances that began or ceased to have chunks since the last call.

        One caller may ask, a rollout's recorder: of two, each would see a part.
        """
        touched, self._touched = self._touched, set()
        return touched

    def check_integrity(self) -> None:
        """Assert that what runs has a chunk; changes nothing."""
        for chunks in self._instances.values():
            assert all(r.chunk is not None for r in chunks.values())
