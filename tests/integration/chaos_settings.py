"""What chaos is to do, and what it did; see `tests.integration.chaos`."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A cluster, its work, and how much of it fails.

    Attributes:
        engine: settings of its engines; with a `model` they are real.
        victims: what fails, as often as it is named here: "trainer", "node" (its
            agent, which also carries weights and drafts), "instance", "worker" (a
            process below an instance, such as vLLM's), "pool" (a server of the KV
            pool), "link" and "disk" (that has the journals).
        short_s, long_s: pauses that nothing notices, and that a time-out notices.
        start_s: within which everything is up again.
        hang_s: a rollout that takes longer hangs.
    """

    num_nodes: int = 2
    victims: tuple[str, ...] = (
        *("trainer", "node", "node", "instance", "link", "link", "disk"),
    )
    num_events: int = 10
    num_groups: int = 12
    max_tokens: int = 500
    node_timeout_s: float = 3.0
    heartbeat_timeout_s: float = 6.0
    short_s: tuple[float, ...] = (0.2, 1.0)
    long_s: float = 9.0
    start_s: float = 60.0
    hang_s: float = 120.0
    engine: dict[str, Any] = field(default_factory=dict)

    def with_events(self, num: int) -> Settings:
        """The same with another number of faults."""
        return replace(self, num_events=num)

    def without_disk(self) -> Settings:
        """The same for who may not mount a disk to fill."""
        victims = tuple(victim for victim in self.victims if victim != "disk")
        return replace(self, victims=victims)


SIMULATED = Settings()


def real() -> Settings:
    """The same with vLLM's engines, which take longer to start, on a tiny model."""
    from tests.e2e.tiny import tiny_model

    one_core = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
    return Settings(
        victims=(*SIMULATED.victims, "worker", "pool"),
        node_timeout_s=5.0,
        heartbeat_timeout_s=15.0,
        long_s=25.0,
        start_s=400.0,
        hang_s=500.0,
        engine={
            "model": str(tiny_model()),
            "chunk_size": 64,
            "env": one_core,
            "speculation": "dgds",
            "kv_pool": {"mode": "lmcache", "dram_bytes": 256 << 20},
        },
    )


@dataclass
class Outcome:
    """What chaos did, over all seeds.

    Attributes:
        num_lost: responses that a whole rollout did not have. num_doubled: that it had
            twice. num_changed: that an undisturbed rollout, or an earlier life of the
            trainer, has otherwise.
        num_hung: rollouts, starts and ends that took too long.
        num_crashed: processes that ended by themselves.
        num_left_behind: processes, files and shared memory.
        recovery_s: by what happened, from then until all instances were up again.
        notes: what went wrong, in words.
    """

    num_rollouts: int = 0
    num_responses: int = 0
    num_lost: int = 0
    num_doubled: int = 0
    num_changed: int = 0
    num_hung: int = 0
    num_crashed: int = 0
    num_left_behind: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    recovery_s: dict[str, list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    notes: list[str] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """All that must not happen."""
        counts = (self.num_lost, self.num_doubled, self.num_changed, self.num_hung)
        return sum(counts) + self.num_crashed + self.num_left_behind
