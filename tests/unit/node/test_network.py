"""This host's place in the network."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from aseer.node import network
from aseer.node.messages import Located
from aseer.node.network import free_port, host_towards, interface_of, located, reached

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


async def test_where_processes_of_other_nodes_reach_those_of_this_one() -> None:
    found = await located("tcp://127.0.0.1:5557")
    assert (found.address, found.interface, found.error) == ("127.0.0.1", "lo", "")
    assert found.port > 0
    lost = await located("tcp://[::1%nowhere]:5557")
    assert lost == Located(error=lost.error)
    assert lost.error


@pytest.mark.parametrize("address", ["", "tcp://host", "tcp://127.0.0.1:x"])
async def test_nonsense_says_nothing_of_a_host(address: str) -> None:
    assert (await reached(address)).is_reached is True


async def test_a_host_is_reached_if_it_says_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        assert (await reached(address)).is_reached is True, "it refuses"
        listening.listen(0)
        assert (await reached(address)).is_reached is True
        assert (await reached(address)).address == address
        # It takes no further one, as a host that is cut off.
        monkeypatch.setattr(network, "REACH_TIMEOUT_S", 0.1)
        with socket.socket() as one, socket.socket() as two:
            for waiting in (one, two):
                waiting.setblocking(False)
                waiting.connect_ex(listening.getsockname())
            assert (await reached(address)).is_reached is False
