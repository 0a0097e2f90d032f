"""What goes straight from a trainer is checked first, and comes whole and rounded."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights.carriers import IpcCarrier, NcclCarrier, Peer, fill, told_of
from aseer.weights.checks import ModelSpec, TensorSpec
from aseer.weights.direct import chosen_way
from aseer.weights.finite import FiniteCheck
from aseer.weights.held import HeldTensors
from tests.lazy import Lazy

if TYPE_CHECKING:
    from collections.abc import Callable

torch = Lazy("torch")

MODEL = ModelSpec(
    {
        "embed.weight": TensorSpec("BF16", (4, 2)),
        "layer.weight": TensorSpec("BF16", (3,)),
        "lm_head.weight": TensorSpec("BF16", (4, 2)),
    },
    dtype="BF16",
    tied=["embed.weight", "lm_head.weight"],
)


def tensors(**changed: Any) -> dict[str, Any]:
    made = {
        "embed.weight": torch.arange(8.0).reshape(4, 2),
        "layer.weight": torch.ones(3, dtype=torch.bfloat16),
    }
    return made | changed


def held(source: Any, device: str = "cpu") -> HeldTensors:
    return HeldTensors(source, MODEL, "ipc", device)


@cache
def sharded_type() -> Any:
    class Sharded(torch.Tensor):  # type: ignore[misc]
        """What a DTensor is to us: its own part, and the whole of all processes."""

        num_gathered = 0

        def to_local(self) -> Any:
            return self.as_subclass(torch.Tensor)[:1]

        def full_tensor(self) -> Any:
            self.num_gathered += 1
            return self.as_subclass(torch.Tensor)

    return Sharded


def sharded(values: Any) -> Any:
    return values.as_subclass(sharded_type())


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's half for a trainer that broadcasts, which keeps what was sent."""
    sent: list[str] = []
    group = SimpleNamespace(
        comm="the group",
        disabled=False,
        destroy=lambda: sent.append("left"),
        nccl=SimpleNamespace(ncclCommAbort=lambda comm: sent.append(f"aborted {comm}")),
    )

    def join(place: dict[str, Any]) -> Any:
        sent.append(f"joined {place['world_size']}")
        return group

    def broadcast(pairs: Any, to: Any, *_: Any) -> None:
        assert to is group
        sent.extend(name for name, _ in pairs)

    parts = SimpleNamespace(
        nccl_common=SimpleNamespace(trainer_init=join),
        packed_tensor=SimpleNamespace(packed_nccl_broadcast_producer=broadcast),
        sent=sent,
    )
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", parts)
    return parts


def test_all_is_sent_under_every_name_and_as_engines_would_round_it() -> None:
    found = held({**tensors(), "rotary_emb.inv_freq": torch.ones(2)})
    assert [name for name, _ in found.sent] == [
        "embed.weight",
        "lm_head.weight",
        "layer.weight",
    ]
    pairs = dict(found.pairs())
    assert {values.dtype for values in pairs.values()} == {torch.bfloat16}
    assert pairs["lm_head.weight"].equal(pairs["embed.weight"])
    assert (found.num_bytes, found.largest_bytes) == (38, 16)
    assert found.device.type == "cpu"


def test_experts_in_one_tensor_are_sent_as_the_checkpoint_has_them() -> None:
    def weight(expert: int, layer: str) -> str:
        return f"layers.0.experts.{expert}.{layer}.weight"

    specs = {
        weight(expert, layer): TensorSpec("F32", (2, 3))
        for expert in range(2)
        for layer in ("gate_proj", "up_proj")
    }
    fused = torch.arange(24.0).reshape(2, 4, 3)
    source = {"layers.0.experts.gate_up_proj": fused}
    found = HeldTensors(source, ModelSpec(specs, "F32"), "ipc", "cpu")
    pairs = dict(found.pairs())
    assert pairs.keys() == specs.keys() == dict(found.sent).keys()
    assert pairs[weight(1, "up_proj")].equal(fused[1, 2:])
    fused[1, 3, 2] = float("nan")
    with pytest.raises(WeightUpdateError, match="gate_up_proj' has values"):
        HeldTensors(source, ModelSpec(specs, "F32"), "ipc", "cpu")


def test_a_wrapped_module_is_taken_and_its_tensors_keep_no_gradient() -> None:
    module = torch.nn.Module()
    module.embed = torch.nn.Embedding(4, 2)
    module.layer = torch.nn.Module()
    module.layer.weight = torch.nn.Parameter(torch.ones(3))
    wrapped = type("DistributedDataParallel", (), {"module": module})()
    assert not any(v.requires_grad for _, v in held(wrapped).pairs())


def test_sharded_tensors_are_gathered_once_each_whether_they_are_sent_or_not() -> None:
    whole = tensors()
    shards = {name: sharded(values) for name, values in whole.items()}
    shards["head_again"] = sharded(whole["embed.weight"])  # the same place
    found = held(shards)
    assert all(shard.num_gathered == 0 for shard in shards.values())
    assert all(v.shape == MODEL.tensors[n].shape for n, v in found.pairs())
    assert all(shard.num_gathered == 1 for shard in shards.values())


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (
            lambda: tensors(**{"layer.weight": torch.full((3,), float("inf"))}),
            "NaN or inf",
        ),
        (lambda: tensors(**{"layer.weight": torch.ones(4)}), r"shape \[4\]"),
        (lambda: tensors(extra=torch.ones(1)), "no tensor 'extra'"),
        (
            lambda: tensors(**{"lm_head.weight": torch.zeros(4, 2)}),
            "has one tensor for both",
        ),
        (lambda: iter(tensors().items()), "takes an nn.Module or a state_dict"),
        (
            lambda: SimpleNamespace(peft_config={}, get_base_model=None),
            "a layer at a time",
        ),
        (dict, "were not given"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(
    made: Callable[[], Any], why: str
) -> None:
    with pytest.raises(WeightUpdateError, match=why):
        held(made())


def test_tensors_elsewhere_are_refused_by_name_with_what_to_do() -> None:
    with pytest.raises(WeightUpdateError, match=r"is on cpu.*use transfer='host'"):
        held(tensors(), "cuda")


def test_auto_goes_straight_only_where_engines_and_tensors_are_ready() -> None:
    source = tensors()
    assert chosen_way("auto", source, "ipc") == "host"  # they are on a CPU
    assert chosen_way("auto", source, None) == "host"
    assert chosen_way("ipc", source, None) == "ipc"
    on_gpu = {"a": SimpleNamespace(device=SimpleNamespace(type="cuda"))}
    assert chosen_way("auto", on_gpu, "ipc") == "ipc"
    assert chosen_way("auto", on_gpu, "nccl") == "nccl"
    assert chosen_way("auto", on_gpu, "sharded_rdt") == "host"
    assert chosen_way("auto", on_gpu, None) == "host"
    assert chosen_way("auto", iter(()), "ipc") == "host"


def test_a_buffer_is_filled_as_often_as_it_takes_and_nothing_lies_askew() -> None:
    buffer = torch.zeros(16, dtype=torch.uint8)
    pairs = [
        ("a", torch.arange(2.0)),  # 8 bytes
        ("b", torch.ones(3, dtype=torch.bfloat16)),  # 6, so that F32 cannot follow
        ("c", torch.arange(2.0) + 5),
        ("d", torch.arange(3.0)),
    ]
    seen = []
    for filled in fill(buffer, iter(pairs)):
        told = told_of(filled)
        start = 0
        for name, dtype, shape, size in zip(*told.values(), strict=True):
            part = buffer[start : start + size].view(getattr(torch, dtype))
            seen.append((name, part.view(shape).clone()))
            start += size
        assert start <= 16
    assert [name for name, _ in seen] == ["a", "b", "c", "d"]
    for (_, values), (_, expected) in zip(seen, pairs, strict=True):
        assert values.equal(expected)


def test_finite_values_of_a_device_are_asked_for_once() -> None:
    num_asked = 0

    class Ends(torch.Tensor):
        """Ends of a tensor on a device that answers late."""

        def tolist(self) -> Any:
            nonlocal num_asked
            num_asked += 1
            return super().tolist()

    check = FiniteCheck()
    late = [(f"w{i}", torch.tensor([0.0, float(i)])) for i in range(5)]
    check._waiting = {"cuda:0": [(n, e.as_subclass(Ends)) for n, e in late]}
    check.finish()
    assert num_asked == 1
    nan = torch.tensor([0.0, float("nan")])
    check._waiting = {"cuda:0": [*late, ("bad", nan)]}
    with pytest.raises(WeightUpdateError, match="'bad' has values"):
        check.finish()
    with pytest.raises(WeightUpdateError, match="'now' has values"):
        check.add("now", nan)
    check.add("whole numbers", torch.ones(2, dtype=torch.int8))


@dataclass
class Engines:
    """Engines that note what they are told."""

    peers: list[Peer]
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def look(self) -> list[Peer]:
        return self.peers

    def _done(self, name: str, info: Any = None) -> Any:
        self.calls.append((name, info))
        return SimpleNamespace(
            result=lambda: None,
            exception=lambda: None,
            add_done_callback=lambda call: None,
        )

    def init(self, info: Any) -> Any:
        return self._done("init", info)

    def update(self, info: Any) -> Any:
        return self._done("update", info)


def test_an_engine_on_a_gpu_without_a_trainers_process_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(IpcCarrier, "_own_handle", lambda self: {"GPU-a": [None]})
    carrier = IpcCarrier(held(tensors()))
    engines: Any = Engines([Peer(0, 1, ("GPU-a",)), Peer(1, 1, ("GPU-b",))])
    with pytest.raises(WeightUpdateError, match="instance 1 is on GPU-b"):
        carrier.get_ready(engines)
    assert engines.calls == []
    engines.peers.pop()
    carrier.get_ready(engines)
    carrier.send(engines, held(tensors()))
    assert [name for name, _ in engines.calls] == ["init", "update"]
    told = engines.calls[-1][1]
    assert told["ipc_handles"] == {"GPU-a": [None]}
    assert told["names"] == ["embed.weight", "lm_head.weight", "layer.weight"]


def test_one_process_broadcasts_to_all_workers_and_the_others_only_gather(
    vllm: SimpleNamespace,
) -> None:
    source = {name: sharded(values) for name, values in tensors().items()}
    carrier = NcclCarrier(held(source))
    engines: Any = Engines([Peer(0, 2, ()), Peer(1, 4, ())])
    carrier.get_ready(engines)
    carrier.send(engines, held(source))
    carrier.close()
    names = ["embed.weight", "lm_head.weight", "layer.weight"]
    assert vllm.sent == ["joined 7", *names, "left"]
    init = engines.calls[0][1]
    assert (init["rank_offset"], init["world_size"], init["packed"]) == (1, 7, True)
    other = NcclCarrier(held(source))
    other.get_ready(None)
    other.send(None, held(source))
    other.close()
    assert all(shard.num_gathered == 2 for shard in source.values())


def test_when_an_engine_fails_the_broadcast_is_broken_off(
    vllm: SimpleNamespace,
) -> None:
    carrier = NcclCarrier(held(tensors()))
    engines: Any = Engines([Peer(0, 1, ())])
    carrier.get_ready(engines)
    fine: Any = SimpleNamespace(exception=lambda: None)
    carrier._give_up_if_failed(fine)
    failed: Any = SimpleNamespace(exception=lambda: OSError("it died"))
    carrier._give_up_if_failed(failed)
    carrier.close()
    assert vllm.sent == ["joined 2", "aborted the group"]


def test_without_vllm_in_the_trainers_environment_nothing_is_broadcast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", None)
    with pytest.raises(WeightUpdateError, match="needs vLLM in the trainer's env"):
        NcclCarrier(held(tensors()))


def test_all_of_the_trainers_processes_tell_their_buffers_and_wait_for_one_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[None] = []

    def gather(every: list[Any], own: dict[str, Any]) -> None:
        every[:] = [own, {"GPU-b": ["of another process"]}]

    group = {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "all_gather_object": gather,
        "barrier": lambda: waits.append(None),
    }
    for name, function in group.items():
        monkeypatch.setattr(torch.distributed, name, function, raising=False)
    monkeypatch.setattr(IpcCarrier, "_own_handle", lambda self: {"GPU-a": [None]})
    carrier = IpcCarrier(held(tensors()))
    engines: Any = Engines([Peer(0, 2, ("GPU-a", "GPU-b"))])
    carrier.get_ready(engines)
    carrier.send(engines, held(tensors()))
    told = engines.calls[-1][1]["ipc_handles"]
    assert told == {"GPU-a": [None], "GPU-b": ["of another process"]}
    assert len(waits) == 1
    follower = IpcCarrier(held(tensors()))
    follower.get_ready(None)
    follower.send(None, held(tensors()))
    assert len(waits) == 2
