"""What is wrong with vLLM's reload of weights, shown by an engine in this process.

    python -m tests.e2e.reload_faults MODEL OTHER

starts vLLM with MODEL, loads the weights of OTHER and those of MODEL again, each time
with other patches, and prints for each choice whether the model is as it was.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from safetensors import safe_open
from vllm import LLM, SamplingParams

from aseer.instance.vllm import patches
from aseer.instance.vllm.reload import Reload

if TYPE_CHECKING:
    from collections.abc import Iterator

# Without sinks, and what looks for lost weights: tests/integration/ has these.
ELSEWHERE = ("load_sinks", "notice_losses")
RELOADS = tuple(
    p for p in patches.PATCHES if p.moment == "reload" and p.name not in ELSEWHERE
)
PROMPTS = [{"prompt_token_ids": [5 + i, 6, 7, 40 + i]} for i in range(3)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)


def tensors_of(model: str) -> Iterator[tuple[str, Any]]:
    for file in sorted(Path(model).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def generated(llm: LLM) -> list[list[float]]:
    """Logprobs of what is sampled, which tell any two models apart."""
    done = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [
        [row[t].logprob for row, t in zip(o.logprobs, o.token_ids, strict=True)]
        for o in (request.outputs[0] for request in done)
    ]


def is_same(one: list[list[float]], other: list[list[float]]) -> bool:
    return all(
        abs(a - b) < 1e-4
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def load(llm: LLM, model: str) -> list[str]:
    worker = llm.llm_engine.model_executor.driver_worker.worker
    with Reload() as reloaded:
        applied = patches.apply("reload", worker.model_runner.model, reloaded)
        worker.reload_weights(weights_iterator=tensors_of(model))
    return applied


def main(model: str, other: str) -> None:
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
    )
    before = generated(llm)
    found = []
    for chosen in product((False, True), repeat=len(RELOADS)):
        patches.PATCHES = RELOADS
        load(llm, other)
        is_changed = not is_same(generated(llm), before)
        patches.PATCHES = tuple(p for p, c in zip(RELOADS, chosen, strict=True) if c)
        names = load(llm, model)
        found.append([names, is_changed, is_same(generated(llm), before)])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
