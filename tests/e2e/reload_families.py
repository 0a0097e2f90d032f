"""What vLLM's reload loses of each family, and what aseer says of that.

    python -m tests.e2e.reload_families FAMILY...

loads each family's tiny model of one seed into vLLM's own model, without an engine, has
its weights replaced by those of another seed, and compares it with a model that was
loaded with these. It prints, of each family, aseer's error and the parameters that
differ. A family may be named with one of `VARIANTS`, or `LORA`: "qwen3:int8".
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from aseer.errors import EngineError
from aseer.instance.vllm import patches
from aseer.instance.vllm.reload import Reload
from tests.e2e.families import FAMILIES, make_family
from tests.e2e.vision import TORCHVISION, make_vision, vision_env

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DTYPES = {"qwen3_next": "bfloat16"}


def tied(directory: Path, family: str, seed: int) -> None:
    """The output layer is the embedding."""
    make_family(directory, family, seed, tie_word_embeddings=True)


def int8(directory: Path, family: str, seed: int) -> None:
    """Every linear layer has whole numbers, and a scale for each of its rows."""
    make_family(directory, family, seed)
    path = directory / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensor / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, path)
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": "channel", "dynamic": False},
        "input_activations": eight | {"strategy": "token", "dynamic": True},
    }
    path = directory / "config.json"
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    written = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(written))


VARIANTS = {"tied": tied, "int8": int8}
LORA = "lora"  # the model has adapters beside its weights


def configured(model: Path, family: str, *, has_lora: bool = False) -> VllmConfig:
    args = EngineArgs(
        model=str(model),
        dtype=DTYPES.get(family, "float32"),
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=64 << 20,
        compilation_config={"custom_ops": ["-rotary_embedding"]},
        enable_lora=has_lora,
        max_lora_rank=8,
    )
    return args.create_engine_config()


def differing(one: Any, other: Any) -> list[str]:
    """Names of the parameters whose values are not the same."""
    theirs = dict(other.named_parameters())
    own = dict(one.named_parameters())
    assert own.keys() == theirs.keys()
    return [name for name, p in own.items() if not torch.equal(p, theirs[name])]


def tried(name: str, scratch: Path) -> tuple[str, list[str]]:
    """Aseer's error, if any, and which parameters are not the new ones."""
    family, _, variant = name.partition(":")
    make = make_family if family in FAMILIES else make_vision
    make = VARIANTS.get(variant, make)
    old, new = scratch / f"{name}-old", scratch / f"{name}-new"
    make(old, family, 0)
    make(new, family, 1)
    loaded = []
    for directory in (old, new):
        config = configured(directory, family, has_lora=variant == LORA)
        with set_current_vllm_config(config):
            model = get_model(vllm_config=config)
            if variant == LORA:
                cpu = torch.device("cpu")
                LoRAModelRunnerMixin().load_lora_model(model, config, cpu)
            loaded.append((config, model))
    (config, model), (_, expected) = loaded
    assert differing(model, expected), "two seeds are two models"
    error = ""
    with set_current_vllm_config(config):
        try:
            with Reload() as reloaded, torch.inference_mode():
                patches.apply("reload", model, reloaded)
                tensors = load_file(new / "model.safetensors").items()
                reload_weights(config, model, iter(tensors), None, True)
        except EngineError as told:
            error = str(told)
    return error, differing(model, expected)


def main(*names: str) -> None:
    sys.path.append(str(TORCHVISION))
    os.environ.update(vision_env())
    _set_torch_accelerator_to_noop()  # as vLLM's workers on a CPU begin
    with tempfile.TemporaryDirectory(prefix="reload-families-") as scratch:
        first = Path(scratch, "first")
        make_family(first, "qwen3_moe")  # so that there are groups for experts
        with set_current_vllm_config(configured(first, "qwen3_moe")):
            init_distributed_environment(1, 0, f"file://{scratch}/meeting", 0, "gloo")
            initialize_model_parallel()
        for name in names:
            found = [name, *tried(name, Path(scratch))]
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
            gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
