"""Addresses that a controller listens at, and that nodes connect to."""

from __future__ import annotations

import ipaddress
import re

from aseer.errors import ConfigError

_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.%]+\]|[^:/\[\]\s]+):(\d{1,5}|\*)")
_ANY_PORT = "*"
_EXAMPLE = "tcp://0.0.0.0:5557"


def check_address(name: str, address: object) -> str:
    """A TCP address with a port, as it is; the port `*` stands for any that is free.

    Raises:
        ConfigError: it is none.
    """
    text = address if isinstance(address, str) else ""
    match = _ADDRESS.fullmatch(text)
    if match is None or (match[2] != _ANY_PORT and int(match[2]) > 65535):
        raise ConfigError(
            f"{name}={address!r} is not allowed; give tcp://HOST:PORT, such as "
            f"{_EXAMPLE!r} or 'tcp://[::]:5557'"
        )
    return text


def host_of(address: str) -> str:
    """The host of a checked address, without the brackets of IPv6."""
    host, _, _ = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a checked address."""
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
