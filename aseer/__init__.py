"""aseer: the rollout phase of synchronous, group-based RL on vLLM, fast and exact.

    async with aseer.Engine(aseer.EngineConfig(model="Qwen/Qwen3-8B")) as engine:
        async with engine.rollout(groups) as rollout:
            async for response in rollout:
                ...

Importing this package imports neither vllm nor torch.
"""

from aseer.config import EngineConfig, KvPoolConfig, SpeculationConfig
from aseer.errors import (
    AseerError,
    ConfigError,
    EngineClosedError,
    EngineError,
    InstanceLostError,
    InstanceStartError,
    InvalidTransition,
    ProtocolError,
    RolloutClosedError,
    RolloutError,
    RolloutInProgressError,
    WeightUpdateError,
)
from aseer.groups import Group
from aseer.report import (
    InstanceReport,
    Progress,
    RolloutReport,
    WeightUpdateReport,
)
from aseer.runtime.desk import Desk
from aseer.runtime.engine import Engine
from aseer.runtime.once import rollout
from aseer.runtime.rollout import Rollout, SyncRollout
from aseer.sampling import SamplingParams
from aseer.types import RequestMetrics, Response
from aseer.version import __version__
from aseer.weights.target import WeightTarget

__all__ = [
    "AseerError",
    "ConfigError",
    "Desk",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "Group",
    "InstanceLostError",
    "InstanceReport",
    "InstanceStartError",
    "InvalidTransition",
    "KvPoolConfig",
    "Progress",
    "ProtocolError",
    "RequestMetrics",
    "Response",
    "Rollout",
    "RolloutClosedError",
    "RolloutError",
    "RolloutInProgressError",
    "RolloutReport",
    "SamplingParams",
    "SpeculationConfig",
    "SyncRollout",
    "WeightTarget",
    "WeightUpdateError",
    "WeightUpdateReport",
    "__version__",
    "rollout",
]
