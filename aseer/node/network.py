"""This host's place in the network, as other hosts reach it."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

from aseer.errors import describe
from aseer.inputs.addresses import host_of
from aseer.node.messages import Located, Reached

# Linux: the address of the interface that a structure names (`man 7 netdevice`).
_SIOCGIFADDR = 0x8915
_IFREQ_BYTES = 256
_ADDRESS_AT = slice(20, 24)  # in the structure: behind a name, a family and a port
# For a connection to another host: the system tries again after one second, and after
# three.
REACH_TIMEOUT_S = 4.0


async def host_towards(controller: str) -> str:
    """The address of this host by which it reaches a controller.

    Args:
        controller: its address, checked.
    Raises:
        OSError: there is no way to it.
    """
    port = int(controller.rpartition(":")[2])
    way = asyncio.get_running_loop().getaddrinfo
    found = await way(host_of(controller), port, type=socket.SOCK_DGRAM)
    family, kind, _, _, address = found[0]
    with socket.socket(family, kind) as there:
        there.connect(address)  # over UDP: nothing is sent
        return str(there.getsockname()[0])


async def address_towards(controller: str) -> str:
    """An address to listen at, of any port, by which this host reaches a controller.

    Raises:
        OSError: there is no way to it.
    """
    host = await host_towards(controller)
    return f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"


async def located(controller: str) -> Located:
    """Where processes of other nodes reach those of this host."""
    try:
        host = await host_towards(controller)
        return Located(host, interface_of(host), free_port(host))
    except Exception as error:
        return Located(error=describe(error))


async def reached(address: str) -> Reached:
    """Whether another host is reached, whatever it does with a connection."""
    try:
        host, port = host_of(address), int(address.rpartition(":")[2])
        async with asyncio.timeout(REACH_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
        writer.transport.abort()
    except (ConnectionError, ValueError):  # the host has said it; or it is no address
        return Reached(address, is_reached=True)
    except OSError:  # also a TimeoutError
        return Reached(address, is_reached=False)
    return Reached(address, is_reached=True)


def interface_of(host: str, proc: Path = Path("/proc")) -> str:
    """The interface that has an address of this host; "" if none is found."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 6:
        rows = (proc / "net/if_inet6").read_text().splitlines()
        named = {row.split()[0]: row.split()[-1] for row in rows}
        return named.get(address.packed.hex(), "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            asked = struct.pack(f"{_IFREQ_BYTES}s", name.encode())
            with suppress(OSError):  # it has no address of this kind
                told = fcntl.ioctl(any_socket, _SIOCGIFADDR, asked)
                if told[_ADDRESS_AT] == address.packed:
                    return name
    return ""


def free_port(host: str) -> int:
    """A port at an address of this host that nobody has at the moment.

    Raises:
        OSError: none can be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        return int(taken.getsockname()[1])


def reachable(address: str, host: str = "") -> str:
    """An address that is listened at, as others reach it.

    Args:
        host: by which they reach this machine; "" = by its name.
    """
    listened, _, port = address.rpartition(":")
    if listened in ("tcp://0.0.0.0", "tcp://[::]"):
        return f"tcp://{host or socket.gethostname()}:{port}"
    return address
