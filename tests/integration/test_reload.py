"""An update of weights fails if vLLM's reload loses some, and only then.

The model is small and loads as vLLM's do; the reload is vLLM's own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from aseer.errors import EngineError
from aseer.instance.vllm.reload import Reload, notice_losses
from tests.lazy import Lazy

torch = Lazy("torch")
SIZE = 4
ROUTED, SHARED, MIXED = "experts.routed", "experts.shared", "mixed.direct"
# Biases keep values during a reload, so that they may be written past their loaders.
DIRECT = (ROUTED, SHARED, MIXED, "norm.bias", "gate.bias")


def parameter(value: float) -> Any:
    return torch.nn.Parameter(torch.full((SIZE,), value), requires_grad=False)


def make_model(*, is_direct: bool = False, passed_over: str = "") -> Any:
    """A model with all that vLLM's reload treats in ways of its own.

    Args:
        is_direct: it writes some tensors past their loaders, as gpt-oss's does.
        passed_over: the tensor of this name is not loaded at all.
    """
    from torch import nn
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    class Packs(QuantizeMethodBase):
        """Computes with another parameter than a checkpoint has."""

        def create_weights(self, *_: Any, **__: Any) -> None: ...

        def apply(self, *_: Any, **__: Any) -> None: ...

        def process_weights_after_loading(self, layer: Any) -> None:
            doubled = parameter(0.0)
            doubled.data.copy_(layer.weight.data * 2)
            layer.packed = doubled
            del layer.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = (
                "embedding",
                "head",
                "packing",
                "gate",
                "experts",
                "mixed",
                "cache",
            )
            for name in parts:
                setattr(self, name, nn.Module())
            self.rotary, self.norm = nn.Module(), nn.LayerNorm(SIZE)
            self.embedding.weight = parameter(1.0)
            self.head.weight = self.embedding.weight
            self.packing.weight = parameter(1.0)
            self.packing.optional = parameter(1.0)  # checkpoints do without
            self.packing.quant_method = Packs()
            self.experts.routed, self.experts.shared = parameter(1.0), parameter(1.0)
            self.mixed.loaded, self.mixed.direct = parameter(1.0), parameter(1.0)
            self.cache.k_scale = parameter(1.0)
            self.cache.quant_method = object.__new__(BaseKVCacheMethod)
            self.gate.bias = parameter(1.0)
            self.experts.e_score_correction_bias = self.gate.bias
            self.rotary.register_buffer("cos_sin_cache", torch.ones(SIZE))

        def load_weights(self, weights: Any) -> set[str]:
            own, loaded = dict(self.named_parameters()), set()
            for name, tensor in weights:
                if name == passed_over:
                    continue
                if is_direct and name in (
                    ROUTED,
                    SHARED,
                    MIXED,
                    "norm.bias",
                    "gate.bias",
                ):
                    own[name].data.copy_(tensor)
                else:
                    own[name].weight_loader(own[name], tensor)
                loaded.add(name)
            return loaded

    return Model()


def tensors(value: float) -> list[tuple[str, Any]]:
    """A checkpoint with nothing of the head, which is tied, nor what is optional."""
    names = ("embedding.weight", "norm.weight", "norm.bias", "packing.weight")
    names += (ROUTED, SHARED, MIXED, "mixed.loaded", "gate.bias")
    return [(name, torch.full((SIZE,), value)) for name in names]


def start(model: Any) -> None:
    """As vLLM does once: with the first weights, which here are in place."""
    from vllm.model_executor.model_loader.reload import layerwise

    layerwise.record_metadata_for_reloading(model)
    model.packing.quant_method.process_weights_after_loading(model.packing)


def reload(model: Any, value: float) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    with Reload() as reloaded:
        assert notice_losses(model, reloaded)
        layerwise.initialize_layerwise_reload(model)
        model.load_weights(tensors(value))
        layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


def test_a_load_that_loses_nothing_passes_whatever_the_layers_are() -> None:
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

    model, reset = make_model(), LayerReloadingInfo.reset
    start(model)
    for value in (2.0, 3.0):
        reload(model, value)
        found = {n: p.tolist() for n, p in model.named_parameters()}
        del found["packing.optional"]
        assert found.pop("packing.packed") == [2 * value] * SIZE
        assert found.pop("cache.k_scale") == [1.0] * SIZE
        assert set(map(tuple, found.values())) == {(value,) * SIZE}
        assert model.head.weight is model.embedding.weight
        assert "load_weights" not in vars(model)
        assert LayerReloadingInfo.reset is reset


def test_what_is_written_past_loaders_fails_the_load_by_its_names() -> None:
    model = make_model(is_direct=True)
    start(model)
    with pytest.raises(EngineError) as found:
        reload(model, 2.0)
    assert model.experts.routed.tolist() == [1.0] * SIZE, "vLLM keeps it"
    assert model.norm.bias.tolist() == [2.0] * SIZE, "it keeps values meanwhile"
    assert f"none in {ROUTED}, {SHARED}, {MIXED}. Save them" in str(found.value)


@pytest.mark.parametrize(
    "name", ["norm.weight", "norm.bias", "packing.weight", "embedding.weight"]
)
def test_what_a_model_passes_over_fails_the_load(name: str) -> None:
    model = make_model(passed_over=name)
    start(model)
    with pytest.raises(EngineError, match=rf"the model has none in .*{name}"):
        reload(model, 2.0)


def test_parameters_that_come_in_another_way_are_not_lost() -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    model = make_model(is_direct=True)
    start(model)
    with Reload() as reloaded:
        assert notice_losses(model, reloaded)
        reloaded.callback(reloaded.mended.update, (ROUTED, SHARED, MIXED))
        layerwise.initialize_layerwise_reload(model)
        model.load_weights(tensors(2.0))
        layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


def test_a_load_that_fails_says_its_own_error_and_leaves_the_model_as_it_was() -> None:
    model = make_model()
    start(model)
    with pytest.raises(KeyError, match="of another model"), Reload() as reloaded:
        notice_losses(model, reloaded)
        model.load_weights([("of another model", None)])
    assert "load_weights" not in vars(model)


def test_a_worker_looks_at_the_model_that_is_loaded_and_not_at_what_wraps_it() -> None:
    """Straight from a trainer, too; CUDA graphs wrap the runner's model."""
    from vllm.model_executor.model_loader.reload import layerwise

    from aseer.instance.vllm.worker import WorkerExtension

    model = make_model(passed_over="norm.bias")
    start(model)
    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace(model=object(), get_model=lambda: model)
    ended: list[str] = []
    worker.weight_transfer_engine = SimpleNamespace(shutdown=lambda: ended.append("x"))
    worker.aseer_begin_transfer()
    layerwise.initialize_layerwise_reload(model)
    model.load_weights(tensors(2.0))
    layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
    with pytest.raises(EngineError, match=r"the model has none in norm\.bias\."):
        worker.aseer_end_transfer()
    assert ended, "the trainer's group is left"
    assert "load_weights" not in vars(model)
