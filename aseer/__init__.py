"""aseer: the rollout phase of synchronous, group-based RL on vLLM, fast and exact.

    async with aseer.Engine(aseer.EngineConfig(model="Qwen/Qwen3-8B")) as engine:
        async with engine.rollout(groups) as rollout:
            async for response in rollout:
                ...

Importing this package imports neither vllm nor torch, and of aseer itself only what is
used: each process of an engine imports aseer, and most need little of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aseer.config import EngineConfig
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
    from aseer.inputs.kv_pool import KvPoolConfig
    from aseer.inputs.speculation import SpeculationConfig
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

# Where each public name is; those of errors are found there without being listed.
_HOMES = {
    "Desk": "runtime.desk",
    "Engine": "runtime.engine",
    "EngineConfig": "config",
    "Group": "groups",
    "InstanceReport": "report",
    "KvPoolConfig": "inputs.kv_pool",
    "Progress": "report",
    "RequestMetrics": "types",
    "Response": "types",
    "Rollout": "runtime.rollout",
    "RolloutReport": "report",
    "SamplingParams": "sampling",
    "SpeculationConfig": "inputs.speculation",
    "SyncRollout": "runtime.rollout",
    "WeightTarget": "weights.target",
    "WeightUpdateReport": "report",
    "__version__": "version",
    "rollout": "runtime.once",
}


# Modules that have public names and need no import of their own.
_MODULES = {"config", "errors", "groups", "report", "sampling", "types"}

if not TYPE_CHECKING:  # a checker would take any name for one that is here

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module with such, when it is first used."""
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}")
        value = globals()[name] = getattr(home, name)
        return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
