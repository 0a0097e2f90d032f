"""What the adapters of trainers on Ray have in common in their settings. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.inputs.fields import refusal, seconds
from aseer.runtime.takes_weights import UPDATE_TIMEOUT_S

#: Siblings come through Ray, one call each, and through a trainer's own balancer. A
#: group starts when all are there, or this long after the first.
JOIN_S = 0.25


@dataclass(frozen=True)
class HostShare:
    """What engines are given of a host where a trainer runs.

    Attributes:
        node_id: Ray's, of the host.
        gpus: ids of the trainer's GPUs there.
        num_instances: that run there.
    """

    node_id: str
    gpus: tuple[str, ...]
    num_instances: int


@dataclass(frozen=True, kw_only=True)
class ActorSettings:
    """What the process that has the engine is told. All of it is plain data.

    Attributes:
        engine: arguments of `EngineConfig`.
        sleeps: whether the engine releases its GPUs between rollouts.
        join_s: see `Engine.open_rollout`.
        update_timeout_s: see `Engine.begin_update`; the trainer gathers meanwhile.
        hosts: of the trainer, the first that of the engine, if it has several; all
            instances then run on nodes there.
    """

    engine: Mapping[str, Any]
    sleeps: bool
    hosts: tuple[HostShare, ...] = ()
    join_s: float = JOIN_S
    update_timeout_s: float = UPDATE_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """What a user sets of aseer's in a trainer's configuration.

    Attributes:
        engine: arguments of `EngineConfig`, without `engine_args`.
        engine_args: arguments of vLLM's.
        times: `join_s` and `update_timeout_s`.
    """

    engine: Mapping[str, Any]
    engine_args: Mapping[str, Any]
    times: Mapping[str, Any]


def own_settings(given: Any, where: str) -> OwnSettings:
    """The user's settings below the trainer's key `where`.

    Raises:
        ConfigError: they are no mapping, a name is none of aseer's, or a time is none.
    """
    own = mapping(given, where)
    join_s = own.pop("join_s", JOIN_S)
    timeout_s = own.pop("update_timeout_s", UPDATE_TIMEOUT_S)
    times = {
        "join_s": seconds(f"{where}.join_s", join_s, or_zero=True),
        "update_timeout_s": seconds(f"{where}.update_timeout_s", timeout_s),
    }
    known = {field.name for field in fields(EngineConfig)}
    for name in own:
        if name not in known:
            raise ConfigError(
                f"{where}.{name} is not known; the settings are those of "
                "aseer.EngineConfig, join_s and update_timeout_s"
            )
    engine_args = mapping(own.pop("engine_args", None), f"{where}.engine_args")
    return OwnSettings(own, engine_args, times)


def check_placement(nodes: list[str], trainer: str, advice: str) -> str:
    """The one node that all of these processes or GPUs are on.

    Raises:
        ConfigError: they are on several.
    """
    if len(set(nodes)) != 1:
        raise ConfigError(
            f"{trainer} runs on one node, and the trainer's processes are on "
            f"{len(set(nodes))}; {advice}"
        )
    return nodes[0]


def mapping(given: Any, where: str) -> dict[str, Any]:
    """The settings below the trainer's key `where`, as a dict of plain data.

    Raises:
        ConfigError: they are no mapping.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise refusal(where, given, f"settings by name, as in {where}.NAME=VALUE")
    settings: dict[str, Any] = plain(given)
    return settings


def plain(value: Any) -> Any:
    """Mappings of any kind (omegaconf's) as dicts, sequences as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if hasattr(value, "__iter__") and not isinstance(value, str | bytes):
        return [plain(each) for each in value]
    return value
