"""One load of new weights into a model by vLLM's reload, and whether all were taken.

While weights are loaded, vLLM's layers have parameters without values, and collect what
comes through the parameters' loaders. A model that writes past a loader, or passes a
tensor over, loses weights without an error: vLLM puts the old values back into a layer
that took nothing, and leaves whatever the memory held in what a layer did not take.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from aseer.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MAX_NAMED = 3
# What LoRA puts between a layer's name and those of its parameters.
_WRAPPED = ".base_layer."


class Reload(ExitStack):
    """Closed once the weights are loaded; what is pushed first is called last.

    Attributes:
        mended: names of the model's parameters that have new values in another way.
    """

    def __init__(self) -> None:
        """None is mended so far."""
        super().__init__()
        self.mended: set[str] = set()

    def replace(self, owner: Any, name: str, new: Callable[..., Any]) -> None:
        """Give a model or a class another method until the weights are loaded."""
        own = vars(owner)
        if name in own:
            self.callback(setattr, owner, name, own[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, new)


class _Layer(NamedTuple):
    """A layer's parameters, as they are to be loaded.

    Attributes:
        sizes: numbers of elements, by the parameter's name in the layer.
        keeping: names of those that keep values during a load, so that what is written
            past their loaders counts: biases.
    """

    name: str
    module: Any
    sizes: dict[str, int]
    keeping: set[str]


def notice_losses(model: Any, reloaded: Reload) -> bool:
    """Have a load of new weights fail if vLLM loses some of them.

    Lost is a parameter whose loader was not called, if the model says that it was
    loaded, if nothing else of its layer was loaded either, or if the layer computes
    with it as it is. Not lost is what another layer shares and has loaded (tied heads),
    scales of the KV cache, which a checkpoint need not have, and `Reload.mended`.

    When the load is closed it raises:
        EngineError: some were lost; says which.
    """
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

    layers = {}
    for name, module in model.named_modules():
        info = layerwise.get_layerwise_info(module)
        layers[id(info)] = _layer(name, module, info)
    taken: dict[int, set[str]] = defaultdict(set)
    claimed: set[str] = set()
    load, reset = model.load_weights, LayerReloadingInfo.reset

    def load_noted(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        claimed.update(name.replace(_WRAPPED, ".") for name in loaded or ())
        return loaded

    def reset_noted(info: Any) -> None:
        taken[id(info)].update(name for name, _ in info.loaded_weights)
        reset(info)

    def check(error: object, *_: object) -> None:
        if error:
            return
        both = [(layer, taken[key]) for key, layer in layers.items()]
        lost = set(_lost(both, claimed)) - reloaded.mended
        if lost:
            raise EngineError(_words(lost))

    reloaded.push(check)
    reloaded.replace(model, "load_weights", load_noted)
    reloaded.replace(LayerReloadingInfo, "reset", reset_noted)
    return True


def _layer(name: str, module: Any, info: Any) -> _Layer:
    from torch.nn.parameter import UninitializedParameter
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

    emptied, _ = info.restore_metadata
    own = {leaf: p for leaf, p in module._parameters.items() if p is not None}
    keeping = {leaf: p for leaf, p in own.items() if leaf in SKIP_TENSORS}
    sizes = {
        leaf: tensor.numel()
        for leaf, tensor in (emptied | keeping).items()
        if not isinstance(tensor, UninitializedParameter)
    }
    return _Layer(name, module, sizes, set(keeping))


def _lost(layers: list[tuple[_Layer, set[str]]], claimed: set[str]) -> Iterator[str]:
    """Names of the parameters whose new values nobody has.

    Args:
        layers: each with the names of its parameters whose loaders were called.
        claimed: the parameters that the model says it has loaded.
    """
    places: set[int] = set()  # of values that are new
    missed: list[tuple[str, _Layer, str]] = []
    for layer, taken in layers:
        must_have = not _has_scales_of_kv(layer.module)
        if taken:
            must_have = not _is_quantised(layer.module)
            made = layer.module._parameters.keys() - layer.sizes.keys()
            places.update(_places(layer.module, taken | made))
        for leaf in layer.sizes.keys() - taken:
            name = f"{layer.name}.{leaf}" if layer.name else leaf
            is_claimed = name.replace(_WRAPPED, ".") in claimed
            if is_claimed and leaf in layer.keeping:
                places.update(_places(layer.module, [leaf]))
            elif is_claimed or must_have:
                missed.append((name, layer, leaf))
    for name, layer, leaf in missed:
        is_shared = not places.isdisjoint(_places(layer.module, [leaf]))
        if layer.sizes[leaf] and not is_shared:
            yield name


def _places(module: Any, leaves: Iterable[str]) -> list[int]:
    """Where a layer's parameters lie in memory, of those that have elements."""
    own = (module._parameters.get(leaf) for leaf in leaves)
    return [p.data_ptr() for p in own if p is not None and p.numel()]


def _has_scales_of_kv(module: Any) -> bool:
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    return isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)


def _is_quantised(module: Any) -> bool:
    """Whether it computes with parameters made of others, which may be optional."""
    method = getattr(module, "quant_method", None)
    return method is not None and "Unquantized" not in type(method).__name__


def _words(lost: set[str]) -> str:
    named = ", ".join(sorted(lost)[:_MAX_NAMED])
    more = f" and {len(lost) - _MAX_NAMED} others" if len(lost) > _MAX_NAMED else ""
    return (
        f"vLLM's reload lost new weights: the model has none in {named}{more}. Save "
        "them as a checkpoint, and start another Engine with that"
    )
