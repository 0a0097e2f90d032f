"""What a CPU computes with of new weights: packed copies of them, made anew.

vLLM's kernels for CPUs read some weights in an order of their own, and its reload
leaves some of these copies as they were.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.instance.vllm.reload import Reload


def pack_tied_heads(model: Any, reloaded: Reload) -> bool:
    """Have a CPU's output layer follow the embedding that it shares its weight with.

    A CPU computes logits from a packed copy of that weight. vLLM's reload makes the
    copy anew only for layers that a checkpoint has tensors of.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
    )

    heads = [
        module
        for module in (model.modules() if is_on_cpu() else ())
        if isinstance(module, ParallelLMHead)
        and isinstance(module.quant_method, UnquantizedEmbeddingMethod)
    ]

    def pack(error: object, *_: object) -> None:
        for head in () if error else heads:
            head.quant_method.process_weights_after_loading(head)

    reloaded.push(pack)
    return bool(heads)


def pack_experts(model: Any, reloaded: Reload) -> bool:
    """Have a CPU's experts compute with the weights that are loaded meanwhile.

    They read weights in an order of their own. vLLM's reload leaves them in a
    checkpoint's order: other numbers, and no error.
    """
    packed: set[int] = set()

    def note(layer: Any, pack: Callable[[Any], None]) -> None:
        packed.add(id(layer))
        pack(layer)

    layers: list[tuple[Any, Any]] = []
    for layer in model.modules() if is_on_cpu() else ():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        experts: Any = getattr(kernel, "fused_experts", None)
        if hasattr(experts, "process_weights_after_loading"):
            layers.append((layer, experts))
    for _, experts in layers:
        pack = experts.process_weights_after_loading
        experts.process_weights_after_loading = functools.partial(note, pack=pack)

    def pack_rest(error: object, *_: object) -> None:
        for _, experts in layers:
            del experts.process_weights_after_loading  # the class's own again
        for layer, experts in layers:
            if not error and id(layer) not in packed:
                experts.process_weights_after_loading(layer)

    reloaded.push(pack_rest)
    return bool(layers)


def is_on_cpu() -> bool:
    """Whether vLLM computes on a CPU in this process."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
