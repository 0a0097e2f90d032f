"""What chaos is to do, and what it did; see `tests.integration.chaos`."""

from __future__ import annotations

import atexit
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A cluster, its work, and how much of it fails.

    Attributes:
        num_own: instances on the trainer's host.
        engine: settings of its engines; with a `model` they are real.
        models: other weights of it; simulated engines have some of their own.
        pools: whether there are KV pools beside simulated engines.
        victims: what fails, as often as it is named here: "trainer", "node" (its
            agent, which also carries weights and drafts), "instance", "worker" (a
            process below an instance, such as vLLM's), "part" (of an instance on a
            node, also of one that spans nodes), "pool" (a server of the KV pool),
            "link", "disk" (that has the journals) and "shm" (a host's /dev/shm).
        shm_bytes: of each host's /dev/shm.
        lasting: that the trainer and the first node live through all of it: they are
            stopped, and not killed.
        short_s, long_s: pauses that nothing notices, and that a time-out notices.
        start_s: within which everything is up again.
        hang_s: a rollout that takes longer hangs.
    """

    num_nodes: int = 2
    num_own: int = 1
    victims: tuple[str, ...] = (
        *("trainer", "node", "node", "instance", "link", "link", "disk", "shm"),
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
    models: tuple[str, ...] = ()
    pools: bool = False
    shm_bytes: int = 96 << 20
    lasting: bool = False

    @property
    def nodes_per_instance(self) -> int:
        """See `EngineConfig`."""
        return int(self.engine.get("nodes_per_instance", 1))

    @property
    def num_weights(self) -> int:
        """Different weights that rollouts take turns with."""
        return len(self.models) or 3

    def with_events(self, num: int) -> Settings:
        """The same with another number of faults."""
        return replace(self, num_events=num)

    def without_mounts(self) -> Settings:
        """The same for who may not mount what is to be filled."""
        victims = tuple(v for v in self.victims if v not in ("disk", "shm"))
        return replace(self, victims=victims)

    def that_last(self) -> Settings:
        """The same for hours, on a machine that others use, too."""
        return replace(self, lasting=True, start_s=240.0, hang_s=400.0)


SIMULATED = Settings()
#: With a KV pool on each host, whose servers fail most.
POOLS = Settings(
    victims=(
        *("trainer", "node", "node", "instance", "link", "disk"),
        *("shm", "shm", "pool", "pool", "pool"),
    ),
    pools=True,
    shm_bytes=192 << 20,
    start_s=120.0,
)
#: Instances that span two nodes each, and a node to spare.
GANGS = Settings(
    num_nodes=3,
    num_own=0,
    victims=(
        *("trainer", "node", "node", "instance", "part", "part"),
        *("link", "link", "disk", "shm"),
    ),
    engine={"nodes_per_instance": 2, "min_nodes": 2},
)


def real() -> Settings:
    """The same with vLLM's engines, which take longer to start, on a tiny model."""
    from aseer.models.tiny import make_tiny
    from tests.e2e.tiny import tiny_model

    others = [tiny_model().with_name(f"{tiny_model().name}-{i}") for i in (3, 4)]
    for seed, other in enumerate(others, 3):
        make_tiny(other, seed=seed)
        atexit.register(shutil.rmtree, other, ignore_errors=True)
    one_core = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
    return Settings(
        victims=(*SIMULATED.victims, "worker", "pool"),
        node_timeout_s=5.0,
        heartbeat_timeout_s=15.0,
        long_s=25.0,
        start_s=400.0,
        hang_s=500.0,
        models=tuple(map(str, others)),
        shm_bytes=1 << 30,
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
            trainer, has otherwise, or that were made with other weights than they say.
        num_cut_short: responses that an update cut short, as it was told to.
        num_updates: of weights, that were made. num_refused: that were not, with what
            the engine had left as it was.
        num_hung: rollouts, starts and ends that took too long.
        num_crashed: processes that ended by themselves.
        num_left_behind: processes, files and shared memory.
        recovery_s: by what happened, from then until all instances were up again.
        refusals: of updates, in words, without numbers.
        watched: what processes that last had, by process; see `Watch`.
        notes: what went wrong, in words.
    """

    num_seeds: int = 0
    num_rollouts: int = 0
    num_responses: int = 0
    num_cut_short: int = 0
    num_updates: int = 0
    num_refused: int = 0
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
    refusals: Counter[str] = field(default_factory=Counter)
    watched: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take_update(self, said: dict[str, Any]) -> None:
        """What the trainer says of an update of weights."""
        if "refused" in said:
            self.num_refused += 1
            self.refusals[re.sub(r"[\d.]+", "N", said["refused"])[:200]] += 1
        else:
            self.num_updates += 1

    @property
    def num_bad(self) -> int:
        """All that must not happen."""
        counts = (self.num_lost, self.num_doubled, self.num_changed, self.num_hung)
        more = (self.num_crashed, self.num_left_behind, self.num_growing)
        return sum(counts) + sum(more)

    @property
    def num_growing(self) -> int:
        """Of what was watched, what is not flat."""
        watched = self.watched.values()
        return sum(not w["is_flat"] for each in watched for w in each.values())
