"""What a PEFT model computes with: the base model's weights, its adapters merged in.

Engines take a model's own tensors and know nothing of adapters. To merge adapters in
place and to take them back, as is usual, leaves its rounding in the base weights. Here
a copy of one layer at a time is merged, and the model stays as it is, bit for bit.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from aseer.errors import WeightUpdateError

if TYPE_CHECKING:
    from collections.abc import Iterator


def has_adapters(source: object) -> bool:
    """Whether it is a `peft.PeftModel`."""
    return hasattr(source, "peft_config") and hasattr(source, "get_base_model")


def merged_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Names, as the base model has them, and tensors of a `peft.PeftModel`.

    Adapters that are active are merged. Of modules that are trained whole
    (`modules_to_save`) it is the trained one.

    Raises:
        WeightUpdateError: the model is sharded, so that no process has a layer whole.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if _is_sharded(model):
        raise WeightUpdateError(
            "adapters are merged where a process has the whole model, and this one is "
            "sharded: merge them in the trainer and give the state_dict that it "
            "gathers, or train without sharding (DDP)"
        )
    base = model.get_base_model()
    replaced = []
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            merged = copy.deepcopy(module)
            merged.merge()
            own = merged.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            own = module.modules_to_save[module.active_adapters[0]]
        else:
            continue
        replaced.append(f"{name}.")
        for key, tensor in own.state_dict().items():
            yield f"{name}.{key}", tensor
    for name, tensor in base.state_dict().items():
        if not name.startswith(tuple(replaced)):
            yield name, tensor


def _is_sharded(model: Any) -> bool:
    return any(hasattr(p, "full_tensor") for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel"
        for module in model.modules()
    )
