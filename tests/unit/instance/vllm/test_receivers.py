"""What is sent to vLLM's transfer engines, with stand-ins for these and for torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.stand_ins import imported

MODULE = "aseer.instance.vllm.receivers"
IPC = "vllm.distributed.weight_transfer.ipc_engine"
NCCL = "vllm.distributed.weight_transfer.nccl_engine"
PLAIN = [None, [8], [1], 0, None, None, 2, b"handle", 8, 0, False]


@dataclass
class Init:
    world_size: int = 0


@dataclass
class Update:
    names: list[str]
    world_size: int = 0
    ipc_handles: dict[str, Any] | None = None


class Engine:
    """How vLLM's engines take what they are told: no field that they do not know."""

    init_info_cls, update_info_cls = Init, Update

    def parse_init_info(self, init_dict: dict[str, Any]) -> Init:
        return self.init_info_cls(**init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Update:
        return self.update_info_cls(**update_dict)


class Of:
    """A type of torch's, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, value: Any) -> tuple[str, Any]:
        return self.name, value


TENSOR, SIZE, STORAGE, BYTES = map(Of, ("Tensor", "Size", "TypedStorage", "uint8"))


@pytest.fixture
def receivers(monkeypatch):
    torch = {
        "Tensor": TENSOR,
        "Size": SIZE,
        "uint8": BYTES,
        "storage": SimpleNamespace(TypedStorage=STORAGE),
    }
    return imported(
        monkeypatch,
        MODULE,
        {
            IPC: {"IPCWeightTransferEngine": Engine},
            NCCL: {"NCCLWeightTransferEngine": Engine},
            "torch": torch,
        },
    )


def test_an_update_has_what_was_told_before_where_it_has_a_field(receivers):
    for receiver in (receivers.IpcReceiver(), receivers.NcclReceiver()):
        told = {"world_size": 5, "rank_offset": 3}
        assert receiver.parse_init_info(told) == Init(5)
        update = receiver.parse_update_info({"names": ["w"], "tensor_sizes": [8]})
        assert asdict(update) == {"names": ["w"], "world_size": 5, "ipc_handles": None}
        assert (
            receiver.parse_update_info({"names": [], "world_size": 6}).world_size == 6
        )


def test_settings_of_one_receiver_are_not_anothers(receivers):
    receivers.IpcReceiver().parse_init_info({"world_size": 5})
    assert receivers.IpcReceiver().parse_update_info({"names": []}).world_size == 0


def test_each_gpus_handle_is_put_together_from_plain_data(receivers):
    told = {"names": ["w"], "ipc_handles": {"GPU-a": PLAIN, "GPU-b": [*PLAIN]}}
    handles = receivers.IpcReceiver().parse_update_info(told).ipc_handles
    whole = (TENSOR, ("Size", [8]), (1,), 0, STORAGE, BYTES, 2, b"handle", 8, 0, False)
    assert handles == {"GPU-a": whole, "GPU-b": whole}
    assert PLAIN[0] is None


@pytest.mark.parametrize("place", [0, 4, 5], ids=["tensor", "storage", "dtype"])
def test_a_description_that_names_a_class_is_refused(receivers, place):
    plain: list[Any] = [*PLAIN]
    plain[place] = "os.system"
    with pytest.raises(ValueError, match=r"a class of its own: .*os\.system"):
        receivers.rebuilt(plain)
