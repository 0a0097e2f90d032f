"""What aseer sends to vLLM's transfer engines goes where each release has it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from aseer.instance.vllm.receivers import IpcReceiver, NcclReceiver, TakesOurs, rebuilt
from aseer.instance.vllm.transfer import OURS, offer_receivers, with_our_receivers

INIT = {"packed": True, "rank_offset": 3, "world_size": 5}
UPDATE = {"names": ["w"], "shapes": [[2]], "tensor_sizes": [8]}


@dataclass
class Nothing:
    """What is told first, in releases up to 0.28."""


@dataclass
class Packing:
    """The same later."""

    packed: bool = False


@dataclass
class OldUpdate:
    """An update, where it says how tensors are packed."""

    names: list[str]
    packed: bool = False


@dataclass
class NewUpdate:
    """An update, where that was said before."""

    names: list[str]
    tensor_sizes: list[int] | None = None


class Engine:
    """How vLLM's engines take what they are told."""

    init_info_cls: type
    update_info_cls: type

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return self.init_info_cls(**init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return self.update_info_cls(**update_dict)


@pytest.mark.parametrize(
    ("init", "update", "expected"),
    [
        (Nothing, OldUpdate, ({}, {"names": ["w"], "packed": True})),
        (
            Packing,
            NewUpdate,
            ({"packed": True}, {"names": ["w"], "tensor_sizes": [8]}),
        ),
    ],
    ids=["before 0.30", "from 0.30 on"],
)
def test_a_field_goes_where_the_release_has_it(
    init: type, update: type, expected: tuple[Any, Any]
) -> None:
    engine = type("Ours", (TakesOurs, Engine), {})()
    engine.init_info_cls, engine.update_info_cls = init, update
    told = (engine.parse_init_info(INIT), engine.parse_update_info(UPDATE))
    assert tuple(map(asdict, told)) == expected


def test_the_installed_release_takes_all_that_is_sent() -> None:
    for receiver in (IpcReceiver, NcclReceiver):
        engine = object.__new__(receiver)
        place = {"master_address": "127.0.0.1", "master_port": 1}
        engine.parse_init_info({**place, **INIT})
        handles = {"GPU-a": [None, [8], [1], 0, None, None, 0, b"h"]}
        told = {**UPDATE, "dtype_names": ["float32"], "ipc_handles": handles}
        update = engine.parse_update_info(told)
        assert update.names == ["w"]


def test_a_shared_buffer_is_described_without_a_class_from_outside() -> None:
    from torch.multiprocessing import reductions

    described = [None, [8], [1], 0, None, None, 2, b"handle", 8, 0, False]
    args = rebuilt(described)
    assert args[0] is torch.Tensor
    assert args[1:4] == (torch.Size([8]), (1,), 0)
    assert args[4:8] == (torch.storage.TypedStorage, torch.uint8, 2, b"handle")
    names = reductions.rebuild_cuda_tensor.__code__.co_varnames
    assert names[:8] == (
        "tensor_cls",
        "tensor_size",
        "tensor_stride",
        "tensor_offset",
        "storage_cls",
        "dtype",
        "storage_device",
        "storage_handle",
    )
    for place in (0, 4, 5):
        with pytest.raises(ValueError, match="a class of its own"):
            rebuilt([*described[:place], print, *described[place + 1 :]])


def test_vllm_finds_ours_by_name_and_engines_are_started_with_them() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    offer_receivers()
    offer_receivers()
    assert set(OURS.values()) <= set(WeightTransferEngineFactory._registry)
    for theirs, ours in OURS.items():
        args = {"model": "m", "weight_transfer_config": {"backend": theirs}}
        told = with_our_receivers(args)
        assert told["weight_transfer_config"] == {"backend": ours}
    other = {"weight_transfer_config": {"backend": "somebody's"}}
    assert with_our_receivers(other) == other
    assert with_our_receivers({"model": "m"}) == {"model": "m"}
