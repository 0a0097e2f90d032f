"""This host's place in the network."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from aseer.node.network import free_port, host_towards, interface_of

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_controller_on_this_machine_is_reached_by_loopback() -> None:
    host = await host_towards("tcp://127.0.0.1:5557")
    assert host == "127.0.0.1"
    assert interface_of(host) == "lo"


def test_an_interface_is_found_by_its_address(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/if_inet6").write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe80000000000000000000fffe000001 02 40 20 80     eth1\n"
    )
    assert interface_of("::1", tmp_path) == "lo"
    assert interface_of("fe80::ff:fe00:1%eth1", tmp_path) == "eth1"
    assert interface_of("fe80::2", tmp_path) == ""
    assert interface_of("192.0.2.1") == ""  # of no host: it is for examples


def test_a_free_port_can_be_bound() -> None:
    port = free_port("127.0.0.1")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", port))
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.1")
