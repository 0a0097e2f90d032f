"""An engine's settings of nodes on other hosts: those that do not go together."""

from __future__ import annotations

from typing import Any

from aseer.errors import ConfigError
from aseer.inputs.engine_args import has_drafter
from aseer.inputs.fields import refusal
from aseer.inputs.plain import as_text

NUM_INSTANCES = "an int >= 1, or None for the default; 0 with listen, but without nodes"


def launcher_name(name: str, given: object) -> str:
    """What starts the nodes, if something does."""
    text = as_text(given)
    if text != "ray":
        raise refusal(name, given, "'ray', or None, and start nodes")
    return text


def check_nodes(config: Any) -> None:
    """Check what an `EngineConfig` says of nodes, and what does not go with that.

    Raises:
        ConfigError: two settings do not go together.
    """
    has_nodes_alone = config.listen is not None and config.nodes is None
    if config.num_instances == 0 and not has_nodes_alone:
        raise refusal("num_instances", 0, NUM_INSTANCES)
    if config.data_parallel_size > 1:
        _check_teams(config)
    if config.nodes_per_instance > 1:
        _check_gangs(config)
    if config.nodes is not None:
        if config.gpus is not None:
            allowed = "num_instances instead: with nodes='ray' Ray says which GPUs"
            raise refusal("gpus", config.gpus, allowed)
        return
    if config.listen is None and config.min_nodes:
        raise refusal("listen", None, "an address, since min_nodes is above 0")
    if config.listen is None and config.controller_file is not None:
        raise refusal("listen", None, "an address, since controller_file is given")
    if config.num_instances == 0 and not config.min_nodes:
        raise refusal("min_nodes", 0, "one >= 1, since num_instances is 0")


def _check_teams(config: Any) -> None:
    """Of engines that compute together."""
    size = config.data_parallel_size
    since = f"since data_parallel_size is {size}"
    if config.nodes_per_instance > 1:
        allowed = f"1, {since}: such engines may be on several nodes, each on one"
        raise refusal("nodes_per_instance", config.nodes_per_instance, allowed)
    if config.nodes is not None:
        allowed = f"None, and start nodes by `aseer node`, {since}"
        raise refusal("nodes", config.nodes, allowed)
    if config.num_instances is not None and config.num_instances % size:
        allowed = f"a multiple of {size}, {since}, or None"
        raise refusal("num_instances", config.num_instances, allowed)
    _refuse_what_is_for_one(config, since, "engines that compute alone")


def _check_gangs(config: Any) -> None:
    """Of engines that span nodes."""
    spans = f"since nodes_per_instance is {config.nodes_per_instance}"
    if config.nodes is not None:
        allowed = f"None, and start nodes by `aseer node`, {spans}"
        raise refusal("nodes", config.nodes, allowed)
    if config.listen is None:
        raise refusal("listen", None, f"an address, {spans}")
    if config.num_instances is None:
        object.__setattr__(config, "num_instances", 0)
    if config.num_instances != 0:
        allowed = (
            f"0, {spans}: such instances run on nodes alone; `aseer node` on this host "
            "makes one of it, too"
        )
        raise refusal("num_instances", config.num_instances, allowed)
    if config.min_nodes < config.nodes_per_instance:
        raise refusal("min_nodes", config.min_nodes, f"as many or more, {spans}")
    _refuse_what_is_for_one(config, spans, "instances within a host")


def _refuse_what_is_for_one(config: Any, since: str, ones: str) -> None:
    """What does not go with engines that need others.

    Args:
        since: why they do. ones: what it is for, in words.
    """
    for name in ("max_lora_rank", "kv_transfer_config"):
        if getattr(config, name) is not None:
            allowed = f"None, {since}: it is for {ones}"
            raise refusal(name, getattr(config, name), allowed)
    if config.kv_pool.mode not in ("auto", "off"):
        allowed = f"'auto' or 'off', {since}: there is no pool for them"
        raise refusal("kv_pool", config.kv_pool.mode, allowed)
    if config.speculation.method != "off":
        allowed = f"'off', {since}: drafts are for {ones}"
        raise refusal("speculation", config.speculation.method, allowed)
    if has_drafter(config.engine_args):
        raise ConfigError(
            f"engine_args has a drafter; leave it out, {since}: drafts are for {ones}"
        )
