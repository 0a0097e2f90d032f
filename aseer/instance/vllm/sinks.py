"""Attention sinks (gpt-oss, MiMo), which vLLM's reload of weights loses.

vLLM's models copy sinks straight into a layer's parameter. During a reload that is a
tensor without values, and afterwards the old values are put back.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aseer.instance.vllm.reload import Reload

_LAYER = re.compile(r"layers\.(\d+)\.")
_SINKS = re.compile(rf"{_LAYER.pattern}.*(sinks|attention_sink_bias)")


def load_sinks(model: Any, reloaded: Reload) -> bool:
    """Have a model compute with the sinks among the weights that are loaded meanwhile.

    Names are the checkpoint's on one side and vLLM's on the other: a layer's number is
    what they share.
    """
    if not any(_SINKS.fullmatch(tail_of(name)) for name, _ in model.named_parameters()):
        return False
    load, given = model.load_weights, {}

    def noted(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for name, tensor in weights:
            if found := _SINKS.fullmatch(tail_of(name)):
                given[found[1]] = tensor.clone()
            yield name, tensor

    def load_noted(
        weights: Iterable[tuple[str, Any]], *args: Any, **kwargs: Any
    ) -> Any:
        return load(noted(weights), *args, **kwargs)

    def copy(error: object, *_: object) -> None:
        if error:
            return
        for name, own in _tensors(model):
            found = _LAYER.search(name)
            if found and found[1] in given:
                _copy_part(given[found[1]], own)
                reloaded.mended.add(name)

    reloaded.push(copy)
    reloaded.replace(model, "load_weights", load_noted)
    return True


def tail_of(name: str) -> str:
    """A name from its layer's number on."""
    found = _LAYER.search(name)
    return name[found.start() :] if found else ""


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """All that hold sinks, with their names.

    Some of vLLM's attention backends keep a copy in another dtype.
    """
    for name, parameter in model.named_parameters():
        if _SINKS.fullmatch(tail_of(name)):
            yield name, parameter.data
    for name, module in model.named_modules():
        sinks = getattr(getattr(module, "impl", None), "sinks", None)
        if sinks is not None:
            yield f"{name}.impl.sinks", sinks.data


def _copy_part(given: Any, own: Any) -> None:
    """Of all heads' sinks those of this worker's heads."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    start = get_tensor_model_parallel_rank() * len(own) if len(own) < len(given) else 0
    own.copy_(given[start : start + len(own)])
