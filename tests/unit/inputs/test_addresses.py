"""Addresses: what is one, and which only this machine reaches."""

from __future__ import annotations

import pytest

from aseer.errors import ConfigError
from aseer.inputs.addresses import check_address, host_of, is_loopback


@pytest.mark.parametrize(
    ("address", "host", "is_local"),
    [
        ("tcp://127.0.0.1:5557", "127.0.0.1", True),
        ("tcp://127.9.9.9:5557", "127.9.9.9", True),
        ("tcp://localhost:1", "localhost", True),
        ("tcp://[::1]:5557", "::1", True),
        ("tcp://0.0.0.0:5557", "0.0.0.0", False),
        ("tcp://[::]:5557", "::", False),
        ("tcp://10.1.2.3:*", "10.1.2.3", False),
        ("tcp://head.example:65535", "head.example", False),
        ("tcp://localhost.example:1", "localhost.example", False),
    ],
)
def test_an_address_is_taken_apart(address: str, host: str, is_local: bool) -> None:
    assert check_address("listen", address) == address
    assert (host_of(address), is_loopback(address)) == (host, is_local)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "head:5557",
        "tcp://head",
        "tcp://:5557",
        "tcp://head:65536",
        "ipc:///tmp/x",
        "tcp://::1:5557",
        "tcp://head:5557/",
        "tcp://a b:1",
        5557,
        None,
    ],
)
def test_what_is_none_is_refused_with_an_example(address: object) -> None:
    with pytest.raises(ConfigError, match=r"listen=.*tcp://HOST:PORT, such as"):
        check_address("listen", address)
