"""A trainer's processes, one of which has the engine.

What goes between them goes over gloo, in a process group of its own: rollouts may take
longer than the ten minutes that NCCL waits, and prompts need no GPU's memory.
"""

from __future__ import annotations

import pickle
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
        """What every process gives, by rank; nothing in all processes but the main.

        Raises:
            RolloutError: another process cannot send what it gives.
            Exception: what this one gives cannot be sent (pickled).
        """
        if self._group is None:
            return [mine]
        pickled, error = b"", None
        try:
            pickled = pickle.dumps(mine)
        except Exception as failure:  # the others are told first, which wait for it
            error = failure
        self._check_all(error)
        everyones: list[Any] = [None] * self._size
        is_main = self._rank == _MAIN
        self._dist.gather_object(
            pickled, everyones if is_main else None, _MAIN, self._group
        )
        return [pickle.loads(one) for one in everyones] if is_main else []

    def scatter(self, make: Callable[[], list[T]]) -> T:
        """This process's share of what the main one, which alone calls it, makes.

        Raises:
            RolloutError: in all others, if that fails.
            BaseException: in the main process, what it failed with.
        """
        if self._group is None:
            return make()[_MAIN]
        mine: list[Any] = [None]
        if self._rank != _MAIN:
            self._dist.scatter_object_list(mine, None, _MAIN, self._group)
            share, failure = mine[0]
            if failure is not None:
                raise RolloutError(f"the rollout failed in the main process: {failure}")
            return pickle.loads(share)  # type: ignore[no-any-return]
        try:
            shares = make()
            told = [(pickle.dumps(share), None) for share in shares]
            if len(told) != self._size:
                raise ValueError(f"{len(told)} shares for {self._size} processes")
        except BaseException as error:  # Ctrl-C as well: the others wait
            failure = f"{type(error).__name__}: {error}"
            failed = [(None, failure)] * self._size
            self._dist.scatter_object_list(mine, failed, _MAIN, self._group)
            raise
        self._dist.scatter_object_list(mine, told, _MAIN, self._group)
        return shares[_MAIN]

    def _check_all(self, error: Exception | None) -> None:
        failures: list[Any] = [None] * self._size
        mine = f"{type(error).__name__}: {error}" if error is not None else None
        self._dist.all_gather_object(failures, mine, self._group)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise RolloutError(f"process {rank} has nothing to send: {failure}")
