"""A process of a trainer on Megatron-Core, tensor parallel over gloo, fed by aseer.

    torchrun --nproc-per-node 2 train.py MODEL ENGINE_PYTHON RESULTS

Steps of a policy gradient with groups' means as baselines. Rank 0 has the engine; all
ranks export the weights together. It writes what it saw to RESULTS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import megatron_cpu  # noqa: F401 -- first
import torch
import torch.distributed as dist
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file

import aseer

STEPS = 3
PROMPTS = [[1, 20, 30 + number] for number in range(4)]
SIBLINGS = 4
MAX_TOKENS = 24
ON_A_CPU = {
    "use_cpu_initialization": True,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "bf16": False,
    "fp16": False,
}


def make_policy(directory: str, rank: int, world: int):
    """The bridge, and this rank's part of the model."""
    bridge = AutoBridge.from_hf_pretrained(directory)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.transformer_layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    provider.tensor_model_parallel_size = world
    for name, value in ON_A_CPU.items():
        setattr(provider, name, value)
    if hasattr(provider, "finalize"):
        provider.finalize()
    model = provider.provide(pre_process=True, post_process=True)
    bridge.load_hf_weights([model])
    # Over gloo the bridge scatters shards of row-parallel weights that lie apart in
    # memory as if they did not; its export has no such fault.
    held = load_file(f"{directory}/model.safetensors")
    with torch.no_grad():
        for number, layer in enumerate(model.decoder.layers):
            for part, name in (
                (layer.self_attention.linear_proj, "self_attn.o_proj"),
                (layer.mlp.linear_fc2, "mlp.down_proj"),
            ):
                whole = held[f"model.layers.{number}.{name}.weight"]
                part.weight.copy_(whole.chunk(world, 1)[rank])
    return bridge, model


def logprobs_of(model, vocab_size: int, prompt: list[int], tokens: list[int]):
    """Of the tokens after the prompt, by Megatron's own forward."""
    ids = torch.tensor([prompt + tokens])
    length = ids.shape[1]
    position = torch.arange(length)[None]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    logits = gather_from_tensor_model_parallel_region(model(ids, position, mask))
    rows = logits[0, len(prompt) - 1 : -1, :vocab_size].log_softmax(-1)
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def sample(engine: aseer.Engine) -> list[tuple]:
    """A rollout: group, prompt, tokens, logprobs, weight version."""
    sampling = {"max_tokens": MAX_TOKENS, "temperature": 1.0}
    groups = [aseer.Group(prompt, n=SIBLINGS, sampling=sampling) for prompt in PROMPTS]
    return [
        (r.group_id, r.prompt_token_ids, r.token_ids, r.logprobs, r.weight_version)
        for r in engine.rollout_sync(groups)
    ]


def shared(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def advantages(responses: list[tuple]) -> list[float]:
    """Rewards are shares of low token ids, less the group's mean."""
    rewards = [
        sum(t < 100 for t in tokens) / MAX_TOKENS for _, _, tokens, *_ in responses
    ]
    groups: dict[str, list[float]] = {}
    for (group, *_), reward in zip(responses, rewards, strict=True):
        groups.setdefault(group, []).append(reward)
    return [
        reward - sum(groups[group]) / len(groups[group])
        for (group, *_), reward in zip(responses, rewards, strict=True)
    ]


def train(directory: str, engine: aseer.Engine | None, rank: int, world: int) -> list:
    bridge, model = make_policy(directory, rank, world)
    vocab_size = json.loads(Path(directory, "config.json").read_text())["vocab_size"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for step in range(STEPS + 1):
        responses = shared(sample(engine) if engine is not None else None)
        loss, worst, total = torch.zeros(()), 0.0, 0
        for response, advantage in zip(responses, advantages(responses), strict=True):
            _, prompt, tokens, said, _ = response
            computed = logprobs_of(model, vocab_size, prompt, tokens)
            worst = max(
                worst, float((computed.detach() - torch.tensor(said)).abs().max())
            )
            loss = loss - advantage * computed.sum()
            total += len(tokens)
        seen.append(
            {
                "weight version": responses[0][-1],
                "responses": len(responses),
                "tokens": total,
                "largest difference of a logprob": worst,
            }
        )
        if step == STEPS:
            return seen
        loss = loss / total
        optimizer.zero_grad()
        loss.backward()
        norm = sum(float(p.grad.norm()) ** 2 for p in model.parameters()) ** 0.5
        seen[-1] |= {"loss": float(loss.detach()), "norm of rank 0's gradients": norm}
        optimizer.step()
        # All ranks gather; one has the engine.
        weights = bridge.export_hf_weights([model], cpu=True, show_progress=False)
        if engine is not None:
            report = engine.update_weights_sync(weights)
            seen[-1]["tensors sent"] = report.num_tensors
        else:
            for _ in weights:
                pass
    return seen


def main(directory: str, engine_python: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    if rank != 0:
        train(directory, None, rank, world)
        return
    config = aseer.EngineConfig(
        model=directory,
        python=engine_python,
        num_instances=1,
        device="cpu",
        dtype="float32",
        kv_pool="off",
        kv_cache_bytes=1 << 26,
        chunk_size=16,
        engine_args={"enforce_eager": True},
    )
    with aseer.Engine(config) as engine:
        seen = train(directory, engine, rank, world)
    Path(results).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
