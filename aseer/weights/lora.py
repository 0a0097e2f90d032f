"""A PEFT model's adapters (LoRA) as they are, for engines that compute with adapters.

They are a thousandth of the model or less, and nothing is rounded to the dtype of the
weights they stand on. Engines get one adapter a layer, whatever the trainer has: those
that are active lie beside each other, each with its own scale in its second factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aseer.errors import WeightUpdateError
from aseer.weights.files import INDEX, index_checkpoint, no_place
from aseer.weights.finite import FiniteCheck
from aseer.weights.names import unwrapped
from aseer.weights.writer import spec_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aseer.weights.checks import ModelSpec
    from aseer.weights.files import Index

FILE = "adapter_model.safetensors"
_PREFIX, _SUFFIX = "base_model.model.", ".weight"
_MERGE = "; leave max_lora_rank out, so that adapters are merged and sent whole"


def send_adapters(source: Any, model: ModelSpec, directory: Path) -> Index:
    """Check a `peft.PeftModel`'s adapters and write them for engines.

    Every process of a sharded trainer calls it, since each factor is gathered.

    Args:
        model: of the engine; its `max_lora_rank` is above 0.
        directory: there already, for the index and the tensors.
    Raises:
        WeightUpdateError: the model is more than its base and adapters of layers, or
            engines cannot have such adapters, or there is no room.
    """
    from msgspec import structs
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    rank, tensors, finite = 0, {}, FiniteCheck()
    for name, first, second in _factors(source):
        module = _fitting(name, first, second, model)
        rank = max(rank, first.shape[0])
        for part, values in (("lora_A", first), ("lora_B", second)):
            finite.add(f"{name}.{part}", values)
            values = values.detach().to("cpu").contiguous()
            tensors[f"{_PREFIX}{module}.{part}{_SUFFIX}"] = values
    finite.finish()
    if not tensors:
        raise WeightUpdateError("the model has no active adapter of any layer")
    try:
        save_file(tensors, directory / FILE)
    except (OSError, SafetensorError) as error:
        raise no_place(OSError(str(error))) from error
    index = structs.replace(index_checkpoint(directory), lora_rank=rank)
    index.write(directory / INDEX)
    return index


def module_of(name: str) -> str:
    """The layer of an adapter's factor, by the factor's name in the file."""
    return name.removeprefix(_PREFIX).removesuffix(_SUFFIX).rpartition(".")[0]


def _factors(source: Any) -> Iterator[tuple[str, Any, Any]]:
    """Names of layers with an adapter, and its two factors, which make up the change
    of the layer's weight: the second times the first.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    _check_base(source)
    for name, layer in source.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(layer, LoraLayer):
            raise _refusal(name, f"a {type(layer).__name__}, which is no LoRA")
        firsts, seconds = [], []
        for adapter in layer.active_adapters:
            if adapter in layer.lora_embedding_A:
                raise _refusal(name, "an adapter of an embedding")
            if adapter not in layer.lora_A:
                continue
            first, second = layer.lora_A[adapter], layer.lora_B[adapter]
            linear = torch.nn.Linear
            if type(first) is not linear or type(second) is not linear:
                raise _refusal(name, "an adapter that is not of a linear layer")
            if layer.lora_variant.get(adapter) is not None:
                raise _refusal(name, "a variant of LoRA, such as DoRA")
            if second.bias is not None:
                raise _refusal(name, "an adapter with a bias")
            firsts.append(_whole(first.weight))
            seconds.append(_whole(second.weight).float() * layer.scaling[adapter])
        if firsts:
            yield name, torch.cat(firsts, 0), torch.cat(seconds, 1)


def _check_base(source: Any) -> None:
    """See that nothing is trained but adapters of layers."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = source.get_base_model()
    own: set[int] = set()
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise _refusal(name, "a module that is trained whole")
        if isinstance(module, ParamWrapper):
            raise _refusal(name, "an adapter of a parameter (target_parameters)")
        if type(module).__name__ == "FullyShardedDataParallel":
            raise WeightUpdateError(
                "the model is sharded by FSDP's first version, where no adapter is a "
                "tensor of its own; shard it by fully_shard, or train with DDP"
            )
        if isinstance(module, BaseTunerLayer):
            base_layer = {id(p) for p in module.get_base_layer().parameters()}
            own |= {id(p) for p in module.parameters()} - base_layer
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise _refusal(name, "a parameter of the base model that is trained")


def _fitting(name: str, first: Any, second: Any, model: ModelSpec) -> str:
    """The layer's name in the checkpoint, once its adapter is seen to fit there."""
    for part, values in (("lora_A", first), ("lora_B", second)):
        spec_of(f"{name}.{part}", values)
    key = unwrapped(name + _SUFFIX, model.tensors)
    wanted = model.tensors.get(key)
    if wanted is None:
        raise WeightUpdateError(
            f"there is an adapter of layer {name!r}, which the engine's model has not"
        )
    shape = (second.shape[0], first.shape[1])
    if wanted.shape != shape:
        raise WeightUpdateError(
            f"the adapter of layer {name!r} is for a weight of shape {list(shape)}; "
            f"the model's has {list(wanted.shape)}"
        )
    rank = first.shape[0]
    if rank > model.max_lora_rank:
        raise WeightUpdateError(
            f"the adapter of layer {name!r} has rank {rank}, and the engine was "
            f"started for {model.max_lora_rank}; set EngineConfig(max_lora_rank={rank})"
        )
    return key.removesuffix(_SUFFIX)


def _whole(values: Any) -> Any:
    gather = getattr(values, "full_tensor", None)
    return (values if gather is None else gather()).detach()


def _refusal(name: str, what: str) -> WeightUpdateError:
    return WeightUpdateError(
        f"engines take adapters of linear layers alone, and {name!r} is {what}{_MERGE}"
    )
