"""Attention sinks are new after vLLM's reload of weights, and old without a patch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from aseer.instance.vllm.reload import Reload
from aseer.instance.vllm.sinks import load_sinks
from tests.lazy import Lazy

if TYPE_CHECKING:
    from collections.abc import Iterable

torch = Lazy("torch")


def model_with_sinks(num_heads: int) -> Any:
    """Two layers that load as gpt-oss does in vLLM; the second's backend has a copy."""
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()
            for _ in range(2):
                layer = nn.Module()
                layer.attn = nn.Module()
                layer.attn.sinks = nn.Parameter(torch.zeros(num_heads))
                self.layers.append(layer)
            self.norm = nn.LayerNorm(2)
            copied = self.layers[1].attn.sinks.detach().clone()
            self.layers[1].attn.impl = SimpleNamespace(sinks=copied)

        def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
            own = dict(self.named_parameters())
            for name, tensor in weights:
                parameter = own[
                    name.removeprefix("model.").replace("self_attn", "attn")
                ]
                if name.endswith("sinks"):
                    parameter.data.copy_(tensor[: len(parameter)])
                else:
                    parameter.weight_loader(parameter, tensor)

    return Model()


def reload(model: Any, weights: dict[str, Any], *, is_patched: bool) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    layerwise.record_metadata_for_reloading(model)
    with Reload() as reloaded:
        if is_patched:
            assert load_sinks(model, reloaded)
        layerwise.initialize_layerwise_reload(model)
        model.load_weights(iter(weights.items()))
        layerwise.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


@pytest.mark.parametrize(("rank", "of_worker"), [(0, [1.0, 2.0]), (1, [3.0, 4.0])])
def test_sinks_are_those_of_the_last_update(
    monkeypatch: pytest.MonkeyPatch, rank: int, of_worker: list[float]
) -> None:
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: rank)
    model = model_with_sinks(2)
    sinks = [layer.attn.sinks for layer in model.layers]
    weights = {
        "model.layers.0.self_attn.sinks": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "model.layers.1.self_attn.sinks": torch.tensor([5.0, 6.0, 7.0, 8.0]),
        "norm.weight": torch.full((2,), 9.0),
        "norm.bias": torch.full((2,), 9.0),
    }
    reload(model, weights, is_patched=False)
    assert model.norm.weight.tolist() == [9.0, 9.0]
    assert sinks[0].tolist() == [0.0, 0.0], "vLLM loads them: the patch can go"
    reload(model, weights, is_patched=True)
    assert [layer.attn.sinks for layer in model.layers] == sinks, "in their place"
    assert sinks[0].tolist() == of_worker
    assert sinks[1].tolist() == [value + 4 for value in of_worker]
    assert model.layers[1].attn.impl.sinks.tolist() == sinks[1].tolist()
    assert "load_weights" not in vars(model)


def test_a_model_without_sinks_is_left_alone() -> None:
    model = torch.nn.Linear(2, 2)
    assert not load_sinks(model, Reload())
