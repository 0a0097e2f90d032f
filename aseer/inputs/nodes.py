"""An engine's settings of nodes on other hosts: checked."""

from __future__ import annotations

from typing import Any

from aseer.errors import ConfigError
from aseer.inputs.addresses import check_address
from aseer.inputs.engine_args import has_drafter
from aseer.inputs.fields import (
    check_directory,
    check_int,
    check_seconds,
    refusal,
    set_field,
)


def check_nodes(config: Any) -> None:
    """Check those fields of an `EngineConfig`, and those that do not go with them.

    Raises:
        ConfigError: one is not allowed.
    """
    check_int(config, "min_nodes", 0)
    check_int(config, "nodes_per_instance", 1)
    check_seconds(config, "node_timeout_s")
    check_directory(config, "key_file", "a file's path")
    check_directory(config, "controller_file", "a file's path")
    if config.listen is not None:
        check_address("listen", config.listen)
    if config.nodes_per_instance > 1:
        _check_gangs(config)
    if config.nodes is not None:
        if config.nodes != "ray":
            raise refusal("nodes", config.nodes, "'ray', or None, and start nodes")
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


def _check_gangs(config: Any) -> None:
    """Of engines that span nodes."""
    spans = f"since nodes_per_instance is {config.nodes_per_instance}"
    if config.nodes is not None:
        allowed = f"None, and start nodes by `aseer node`, {spans}"
        raise refusal("nodes", config.nodes, allowed)
    if config.listen is None:
        raise refusal("listen", None, f"an address, {spans}")
    if config.num_instances is None:
        set_field(config, "num_instances", 0)
    if config.num_instances != 0:
        allowed = (
            f"0, {spans}: such instances run on nodes alone; `aseer node` on this host "
            "makes one of it, too"
        )
        raise refusal("num_instances", config.num_instances, allowed)
    if config.min_nodes < config.nodes_per_instance:
        raise refusal("min_nodes", config.min_nodes, f"as many or more, {spans}")
    nothing = f"None, {spans}: it is for instances within a host"
    for name in ("max_lora_rank", "kv_transfer_config"):
        if getattr(config, name) is not None:
            raise refusal(name, getattr(config, name), nothing)
    if config.kv_pool.mode not in ("auto", "off"):
        allowed = f"'auto' or 'off', {spans}: there is no pool for them"
        raise refusal("kv_pool", config.kv_pool.mode, allowed)
    drafts_are_for = "drafts are for instances within a host"
    if config.speculation.method != "off":
        allowed = f"'off', {spans}: {drafts_are_for}"
        raise refusal("speculation", config.speculation.method, allowed)
    if has_drafter(config.engine_args):
        raise ConfigError(
            f"engine_args has a drafter; leave it out, {spans}: {drafts_are_for}"
        )
