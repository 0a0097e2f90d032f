"""How long does a weight update take, and what bounds it?

Two one-core engines with SmolLM2 in float32, idle; a `state_dict` and a checkpoint's
directory in turns. Beside the update's own parts stand three floors: copying that many
bytes once into memory that this process has (`memcpy_s`) and into memory that it has
yet to get (`copy_s`), and reading them once to look for NaN. `sent_of_memcpy` is the
speed of sending as a share of the first, from the fourth update on, when there is a
mapped file to be written again.

SmolLM2 has small tensors, each of which takes some Python. So six layers as an 8B model
has them, in bfloat16, are sent without engines, too: `layers_sent_of_memcpy`.

Expected: sending at 0.7 of memcpy or more. Switching is vLLM's
reload, layer by layer: a copy of every tensor into a fresh layer and one into place, on
the engine's one core, both engines at once on the same memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from common import print_result, quantiles, result_line
from safetensors.torch import load_file

import aseer
from aseer.models import smollm2, tiny
from aseer.weights.checks import ModelSpec, TensorSpec
from aseer.weights.mappings import Mappings, unmap
from aseer.weights.sending import send

if TYPE_CHECKING:
    from collections.abc import Mapping


def floors(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Seconds to copy, and to look at, every tensor once."""
    times = [time.perf_counter()]
    copies = [tensor.clone() for tensor in weights.values()]
    times.append(time.perf_counter())
    for copy, tensor in zip(copies, weights.values(), strict=True):
        copy.copy_(tensor)
    times.append(time.perf_counter())
    for tensor in copies:
        torch.aminmax(tensor)
    times.append(time.perf_counter())
    names = ("copy_s", "memcpy_s", "look_s")
    return {n: b - a for n, a, b in zip(names, times, times[1:], strict=False)}


def layers(num_layers: int, scale: int) -> dict[str, torch.Tensor]:
    """Tensors of so many layers of Llama 3 8B, each side divided by `scale`."""
    hidden, inner, heads = 4096 // scale, 14336 // scale, 1024 // scale
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (heads, hidden),
        "v_proj": (heads, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "norm": (hidden,),
    }
    return {
        f"layers.{i}.{name}": torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1)
        for i in range(num_layers)
        for name, shape in shapes.items()
    }


def send_layers(
    weights: Mapping[str, torch.Tensor], repeats: int
) -> dict[str, list[float]]:
    """Seconds to copy them, and to send them into a file that is written again."""
    specs = {n: TensorSpec("BF16", tuple(t.shape)) for n, t in weights.items()}
    model, mappings = ModelSpec(specs, "bfloat16", [], []), Mappings()
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    times: dict[str, list[float]] = {"layers_memcpy_s": [], "layers_send_s": []}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for _ in range(repeats + 2):  # the first gets the file's pages, one maps them
            started = time.perf_counter()
            send(weights, model, Path(folder), mappings)
            sent = time.perf_counter()
            for name, tensor in weights.items():
                copies[name].copy_(tensor)
            times["layers_send_s"].append(sent - started)
            times["layers_memcpy_s"].append(time.perf_counter() - sent)
        unmap(mappings.take_but(()))
    return {name: values[2:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", help="file for the result")
    parser.add_argument("--smoke", action="store_true", help="the tiny model, twice")
    args = parser.parse_args()
    size = (1, 16) if args.smoke else (6, 1)
    of_layers = send_layers(layers(*size), args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            model, args.repeats, args.dtype = tiny.make_tiny(Path(folder)), 2, "float32"
        else:
            model = smollm2.prepare(dtype=args.dtype)
        weights = load_file(Path(model) / "model.safetensors")
        config = aseer.EngineConfig(
            model=str(model),
            device="cpu",
            num_instances=args.engines,
            max_model_len=512,
            kv_cache_bytes=64 << 20,
        )
        times: dict[str, list[float]] = {}
        with aseer.Engine(config) as engine:
            for _ in range(args.repeats):
                for name, value in floors(weights).items():
                    times.setdefault(name, []).append(value)
                for kind, source in (("state_dict", weights), ("directory", model)):
                    started = time.perf_counter()
                    report = engine.update_weights_sync(source)
                    whole = time.perf_counter() - started
                    times.setdefault(f"{kind}_s", []).append(whole)
                    for part in ("send_s", "prepare_s", "switch_s"):
                        value = getattr(report, part)
                        times.setdefault(f"{kind}_{part}", []).append(value)
    figures: dict[str, Any] = {
        name: quantiles(values[1:], digits=4) for name, values in times.items()
    }
    figures |= {name: quantiles(values, digits=4) for name, values in of_layers.items()}
    sent = times["state_dict_send_s"][3:]  # one before got the pages, one mapped them
    if sent:
        figures["sent_of_memcpy"] = round(median(times["memcpy_s"]) / median(sent), 2)
    ratio = median(of_layers["layers_memcpy_s"]) / median(of_layers["layers_send_s"])
    figures["layers_sent_of_memcpy"] = round(ratio, 2)
    figures["megabytes"] = round(report.num_bytes / 1e6, 1)
    settings = {k: v for k, v in vars(args).items() if k != "save"}
    line = result_line("weights", settings=settings, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
