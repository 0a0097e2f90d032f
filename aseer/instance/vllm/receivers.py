"""vLLM's transfer engines, as workers have them: they take what aseer sends.

vLLM's releases have the same fields in other places, and describe shared memory of a
GPU with classes, for which something must be unpickled on the way. Here a field goes
where the installed release has it, and a description is put together from plain data.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

if TYPE_CHECKING:
    from collections.abc import Mapping

_HANDLES = "ipc_handles"


class TakesOurs:
    """Mixed into one of vLLM's transfer engines."""

    init_info_cls: type
    update_info_cls: type
    _settings: Mapping[str, Any] = {}

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        """Keep what another release wants only with an update."""
        self._settings = dict(init_dict)
        known = _known(init_dict, self.init_info_cls)
        return super().parse_init_info(known)  # type: ignore[misc]

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """Add what an earlier call brought, and make handles of plain data."""
        told = {**self._settings, **update_dict}
        if _HANDLES in told:
            told[_HANDLES] = {
                gpu: rebuilt(plain) for gpu, plain in told[_HANDLES].items()
            }
        known = _known(told, self.update_info_cls)
        return super().parse_update_info(known)  # type: ignore[misc]


class IpcReceiver(TakesOurs, IPCWeightTransferEngine):  # type: ignore[misc]
    """Reads the buffer of a trainer on the same GPU."""


class NcclReceiver(TakesOurs, NCCLWeightTransferEngine):  # type: ignore[misc]
    """Receives what a trainer on other GPUs broadcasts."""


def rebuilt(plain: list[Any]) -> tuple[Any, ...]:
    """torch's description of a shared buffer of bytes, from its plain data.

    Raises:
        ValueError: it names a class, which only this function may.
    """
    import torch

    tensor, size, *_ = plain
    if tensor is not None or plain[4] is not None or plain[5] is not None:
        raise ValueError(f"a shared buffer comes with a class of its own: {plain!r}")
    args = list(plain)
    args[0], args[1] = torch.Tensor, torch.Size(size)
    args[4], args[5] = torch.storage.TypedStorage, torch.uint8
    return tuple(tuple(x) if isinstance(x, list) else x for x in args)


def _known(given: Mapping[str, Any], record: type) -> dict[str, Any]:
    names = {field.name for field in fields(record)}
    return {name: value for name, value in given.items() if name in names}
