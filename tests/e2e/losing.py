"""A worker's extension with a vLLM that loses one layer's new weights.

Its model writes them past their loader, as vLLM's gpt-oss does with experts.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader.reload import inplace

LOST = "model.layers.1.mlp.down_proj"


class Extension:
    """There is nothing in it: importing the module is what counts."""


_initialize = inplace.initialize_layerwise_reload


def _initialize_and_lose(model: Any) -> None:
    _initialize(model)
    layer = model.get_submodule(LOST)
    layer.weight.weight_loader = _write


def _write(parameter: Any, tensor: Any) -> None:
    parameter.data.copy_(tensor)


inplace.initialize_layerwise_reload = _initialize_and_lose
