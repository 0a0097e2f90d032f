"""How long an engine's step takes: a roofline of a model on an instance's GPUs.

A step reads the weights and every running request's KV once, and computes every token
it is given. It takes the longer of the two, at the shares of the peak that engines
reach, and a fixed time for everything else (launches, sampling, communication):

    max(bytes / bandwidth, flops / peak) + overhead

Weights of a mixture of experts are read as far as the step's tokens touch them: with
tokens choosing k of E experts evenly, that is a share 1 - (1 - k/E)^tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class StepTime(Protocol):
    """What the simulator asks of a model on an instance."""

    def seconds(self, num_tokens: float, num_kv_tokens: float) -> float:
        """Of a step that computes `num_tokens` tokens beside `num_kv_tokens` of KV."""
        ...

    def prefill_s(self, num_tokens: int) -> float:
        """By which computing that many prompt tokens lengthens the steps around it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator, by its data sheet.

    Attributes:
        memory_bytes: of its own. bandwidth: bytes/s of that. flops: dense, bf16, per s.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a model counts for time and memory.

    Attributes:
        weight_bytes: of all weights.
        active_params: that a token is multiplied with.
        kv_bytes_per_token: of all layers.
        attention_flops: that a token spends on each token of its context.
        num_experts, experts_per_token: 0 of a dense model.
        expert_share: of the weights that are routed experts'.
    """

    name: str
    weight_bytes: float
    active_params: float
    kv_bytes_per_token: float
    attention_flops: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """`StepTime` of a model on `num_gpus` GPUs that share it evenly.

    Attributes:
        memory_efficiency, compute_efficiency: shares of the peaks that are reached.
        overhead_s: of a step, whatever it does.
    """

    model: ModelShape
    gpu: Gpu
    num_gpus: int = 1
    memory_efficiency: float = 0.7
    compute_efficiency: float = 0.5
    overhead_s: float = 0.004

    def seconds(self, num_tokens: float, num_kv_tokens: float) -> float:
        """See `StepTime`."""
        model = self.model
        touched = 1.0
        if model.num_experts:
            missed = 1 - model.experts_per_token / model.num_experts
            touched -= model.expert_share * missed**num_tokens
        moved = model.weight_bytes * touched + num_kv_tokens * model.kv_bytes_per_token
        # Drafted tokens of a request attend to the same context.
        flops = 2 * model.active_params * num_tokens
        flops += model.attention_flops * num_kv_tokens
        return self.overhead_s + max(
            moved / (self.gpu.bandwidth * self.num_gpus * self.memory_efficiency),
            flops / (self.gpu.flops * self.num_gpus * self.compute_efficiency),
        )

    def prefill_s(self, num_tokens: int) -> float:
        """See `StepTime`. Attention within the prompt is included."""
        model = self.model
        flops = 2 * model.active_params * num_tokens
        flops += model.attention_flops * num_tokens**2 / 2
        return flops / (self.gpu.flops * self.num_gpus * self.compute_efficiency)

    def kv_tokens(self, memory_share: float = 0.9, reserve_bytes: float = 4e9) -> int:
        """KV tokens that fit beside the weights.

        Args:
            memory_share: of the GPUs' memory that the engine may use.
            reserve_bytes: of each GPU, for activations and graphs.
        """
        usable = memory_share * self.gpu.memory_bytes - reserve_bytes
        free = self.num_gpus * usable - self.model.weight_bytes
        return max(0, int(free / self.model.kv_bytes_per_token))


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="A100-80G", memory_bytes=80e9, bandwidth=2.0e12, flops=312e12),
        Gpu(name="H800", memory_bytes=80e9, bandwidth=3.35e12, flops=989e12),
        Gpu(name="H100", memory_bytes=80e9, bandwidth=3.35e12, flops=989e12),
        Gpu(name="H200", memory_bytes=141e9, bandwidth=4.8e12, flops=989e12),
        Gpu(name="B200", memory_bytes=180e9, bandwidth=8.0e12, flops=2250e12),
    )
}

# Public shapes; MLA keeps one latent of 576 values a layer and attends with its heads.
MODELS: Mapping[str, ModelShape] = {
    model.name: model
    for model in (
        ModelShape(
            name="moonlight",
            weight_bytes=32e9,
            active_params=2.9e9,
            kv_bytes_per_token=31_104,
            attention_flops=27 * 16 * 2 * (576 + 512),
            num_experts=64,
            experts_per_token=6,
            expert_share=0.87,
        ),
        ModelShape(
            name="qwen2-vl-72b",
            weight_bytes=146e9,
            active_params=72.7e9,
            kv_bytes_per_token=327_680,
            attention_flops=80 * 64 * 4 * 128,
        ),
        ModelShape(
            name="kimi-k2",
            weight_bytes=1030e9,
            active_params=32e9,
            kv_bytes_per_token=70_272,
            attention_flops=61 * 64 * 2 * (576 + 512),
            num_experts=384,
            experts_per_token=8,
            expert_share=0.98,
        ),
        ModelShape(
            name="qwen3-8b",
            weight_bytes=16.4e9,
            active_params=8.2e9,
            kv_bytes_per_token=147_456,
            attention_flops=36 * 32 * 4 * 128,
        ),
        ModelShape(
            name="qwen3-32b",
            weight_bytes=65.5e9,
            active_params=32.8e9,
            kv_bytes_per_token=262_144,
            attention_flops=64 * 64 * 4 * 128,
        ),
    )
}
