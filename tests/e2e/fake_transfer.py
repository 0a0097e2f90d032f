"""A transfer engine for tests, registered with vLLM as anybody's own may be.

It is vLLM's engine for shared GPU memory, but that the "memory" is a file; how weights
are loaded, and in which order it is called, is vLLM's. `CALLS` (a variable of the
environment) names a file in which it keeps its calls, and `FAIL` one of them at which
it fails.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

from aseer.instance.vllm.receivers import TakesOurs

CALLS, FAIL = "FAKE_TRANSFER_CALLS", "FAKE_TRANSFER_FAILS_AT"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the trainer puts its buffer."""

    path: str


class FileEngine(TakesOurs, IPCWeightTransferEngine):
    """See the module."""

    init_info_cls = InitInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._note("init")
        self._path = init_info.path

    def start_weight_update(self) -> None:
        self._note("start")
        super().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's, which then waits for an accelerator that there is none of."""
        self.receive_weights(self.parse_update_info({**update_info, "ipc_handles": {}}))

    def receive_weights(self, update_info: IPCWeightTransferUpdateInfo) -> None:
        self._note("update")
        data = bytearray(Path(self._path).read_bytes())
        sizes = update_info.tensor_sizes
        buffer = torch.frombuffer(data, dtype=torch.uint8)[: sum(sizes)]
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        names, shapes = update_info.names, update_info.shapes
        self.model.load_weights(unpack_tensor(buffer, names, shapes, dtypes, sizes))

    def finish_weight_update(self) -> None:
        self._note("finish")
        super().finish_weight_update()

    def shutdown(self) -> None:
        self._note("shutdown")

    def _note(self, call: str) -> None:
        with Path(os.environ[CALLS]).open("a") as calls:
            calls.write(f"{os.getpid()} {call}\n")
        if os.environ.get(FAIL) == call:
            raise RuntimeError(f"told to fail at {call}")


class Extension:
    """A user's worker extension, whose module registers the engine."""


WeightTransferEngineFactory.register_engine("aseer-test", FileEngine)
