"""A trainer's processes, one of which has the engine.

What goes between them goes over gloo, in a process group of its own: rollouts may take
longer than the ten minutes that NCCL waits, and prompts need no GPU's memory.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from aseer.errors import RolloutError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_MAIN = 0
_LONGEST_ROLLOUT = timedelta(days=1)  # a process that ends is noticed at once


class Processes:
    """All processes of torch.distributed's default group, or this one alone.

    All of them make it, and then call its methods, at the same points. The main one is
    that of rank 0.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self._rank, self._size, self._group = _MAIN, 1, None
        if dist.is_available() and dist.is_initialized():
            self._rank, self._size = dist.get_rank(), dist.get_world_size()
        if self._size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST_ROLLOUT)

    def gather(self, mine: T) -> list[T]:
        """What every process gives, by rank; nothing in all processes but the main."""
        if self._group is None:
            return [mine]
        everyones: list[Any] = [None] * self._size
        is_main = self._rank == _MAIN
        self._dist.gather_object(
            mine, everyones if is_main else None, _MAIN, self._group
        )
        return everyones if is_main else []

    def scatter(self, make: Callable[[], list[T]]) -> T:
        """This process's share of what the main one, which alone calls it, makes.

        Raises:
            RolloutError: in all others, if that fails.
            Exception: in the main process, what it failed with.
        """
        if self._group is None:
            return make()[_MAIN]
        mine: list[Any] = [None]
        if self._rank != _MAIN:
            self._dist.scatter_object_list(mine, None, _MAIN, self._group)
            share, failure = mine[0]
            if failure is not None:
                raise RolloutError(f"the rollout failed in the main process: {failure}")
            return share  # type: ignore[no-any-return]
        try:
            shares = [(share, None) for share in make()]
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            failed = [(None, failure)] * self._size
            self._dist.scatter_object_list(mine, failed, _MAIN, self._group)
            raise
        self._dist.scatter_object_list(mine, shares, _MAIN, self._group)
        return shares[_MAIN][0]
