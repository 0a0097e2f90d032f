"""What the list runs on, and how large everything is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aseer.config import EngineConfig
from aseer.models.tiny import make_tiny

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_MODEL = "Qwen/Qwen3-8B"
# Engines of a tiny model: an engine's share of any GPU is less than this.
_TINY_KV_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much work there is.

    Attributes:
        groups, siblings, max_tokens: of the rollout with the real model.
        rows, step_tokens: the limits that are held against the defaults.
        batches: numbers of requests for which drafts are timed.
        draft_tokens: of each response then.
        num_engines: of the real model's rollout.
        ranks: numbers of workers that an engine is tried with.
    """

    groups: int
    siblings: int
    max_tokens: int
    rows: int
    step_tokens: int
    batches: tuple[int, ...]
    draft_tokens: int
    num_engines: int
    ranks: tuple[int, ...]


def sizes_for(num_gpus: int) -> Sizes:
    """The sizes for so many GPUs; 0 = a CPU, where all is done in minutes."""
    if num_gpus == 0:
        return Sizes(
            groups=6,
            siblings=4,
            max_tokens=64,
            rows=16,
            step_tokens=2048,
            batches=(1, 4),
            draft_tokens=64,
            num_engines=2,
            ranks=(1, 2),
        )
    # Heads are shared out among ranks, so that their number is a power of two.
    most = 1 << (num_gpus.bit_length() - 1)
    return Sizes(
        groups=256,
        siblings=8,
        max_tokens=1024,
        rows=1024,
        step_tokens=16_384,
        batches=(1, 4, 16, 64),
        draft_tokens=512,
        num_engines=num_gpus,
        ranks=tuple(sorted({1, min(2, most), min(8, most)})),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the list runs.

    Attributes:
        scratch: for models, removed in the end.
        logs: for engines' logs, which stay.
        gpus: ids of those that vLLM can use; empty = engines run on the CPU.
        model: the real one, a directory or a name; None = the tiny one takes its place.
        checkout: where bench/ and examples/ are; None = they are not here.
    """

    scratch: Path
    logs: Path
    gpus: tuple[str, ...]
    model: str | None
    checkout: Path | None

    @property
    def num_gpus(self) -> int:
        """0 = engines run on the CPU."""
        return len(self.gpus)

    @property
    def on_gpu(self) -> bool:
        """Whether engines run on GPUs."""
        return bool(self.gpus)

    @property
    def sizes(self) -> Sizes:
        """How much work there is here."""
        return sizes_for(self.num_gpus)

    @property
    def max_engines(self) -> int:
        """Engines that can be up at once."""
        return self.num_gpus or 2

    def tiny(self, seed: int = 0, *, wide: bool = False) -> Path:
        """A tiny model with weights of this seed, made if it is not there.

        Args:
            wide: with heads for 8 workers.
        """
        folder = self.scratch / f"{'wide' if wide else 'tiny'}-{seed}"
        if (folder / "model.safetensors").exists():
            return folder
        if not wide:
            return make_tiny(folder, seed=seed)
        return make_tiny(
            folder, hidden_size=512, num_heads=8, num_kv_heads=8, seed=seed
        )

    def real(self) -> str:
        """The model of the larger rollouts."""
        return str(self.tiny()) if self.model is None else self.model

    def tiny_config(self, what: str, **settings: Any) -> EngineConfig:
        """Engines of the tiny model, in float32, pool and drafts off.

        Args:
            what: they are for; their logs are in a folder of this name.
            settings: of `EngineConfig`, before these.
        """
        defaults: dict[str, Any] = {
            "model": str(self.tiny()),
            "num_instances": 1,
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 4,
            "chunk_size": 32,
            # A GPU is done in a fraction of a second, and what dies is to die before.
            "report_interval_s": 0.02,
            "kv_cache_bytes": _TINY_KV_BYTES,
            "kv_pool": "off",
            "log_dir": self.logs / what,
        }
        return EngineConfig(**defaults | settings)

    def real_config(self, what: str, **settings: Any) -> EngineConfig:
        """Engines of the real model, as a user starts them, but for the lengths."""
        defaults: dict[str, Any] = {
            "model": self.real(),
            "num_instances": self.sizes.num_engines,
            "max_model_len": self.sizes.max_tokens + 1024,
            "chunk_size": self.sizes.max_tokens // 4,  # so that responses are divided
            "log_dir": self.logs / what,
        }
        if not self.on_gpu:  # the pool has a step of its own, and starts slowly
            defaults |= {"kv_cache_bytes": 256 << 20, "kv_pool": "off"}
        return EngineConfig(**defaults | settings)


def too_few_gpus(site: Site, wanted: int) -> str:
    """Why a step for so many engines of a GPU each is skipped; "" = it is not."""
    if site.max_engines >= wanted:
        return ""
    return f"it takes {wanted} GPUs, and this machine has {site.num_gpus}"
