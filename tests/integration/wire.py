"""A switch between hosts that loses, delays and cuts what goes through it.

    python -m tests.integration.wire CONTROL PID:ADDRESS ...

It makes a device `eth0` in the network of each process, and carries IPv4 packets among
them. CONTROL is a file of JSON, read again whenever it changes: by address,
{"loss": 0.02, "delay_ms": 5, "is_cut": false}, for what a host sends and is sent. Says
`ready` when the devices are there.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN_WITHOUT_HEADER = 0x1001
_MTU = 9000
_LOOK_INTERVAL_S = 0.05
_AT_ONCE = 64


def _enter(network: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(network, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def make_device(pid: int, address: str) -> int:
    """A device in a process's network; what is sent to it comes out of the file."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    _enter(there)
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        request = struct.pack("16sH22x", b"eth0", _IFF_TUN_WITHOUT_HEADER)
        fcntl.ioctl(device, _TUNSETIFF, request)
        for command in (
            f"ip addr add {address}/24 dev eth0",
            f"ip link set eth0 mtu {_MTU} txqueuelen 2000 up",
        ):
            subprocess.run(command.split(), check=True)
    finally:
        _enter(own)
        os.close(own)
        os.close(there)
    return device


class Switch:
    """Carries packets by the rules."""

    def __init__(self, control: Path, devices: dict[str, int]) -> None:
        self._control = control
        self._devices = devices
        self._hosts = {device: host for host, device in devices.items()}
        self._by_ip = {socket.inet_aton(host): host for host in devices}
        self._rules: dict[str, dict[str, Any]] = {}
        self._read_at = 0
        self._due: list[tuple[float, int, str, bytes]] = []
        self._num_packets = 0
        self._poll = select.epoll()
        for device in self._hosts:
            self._poll.register(device, select.EPOLLIN)

    def run(self) -> None:
        """Carry them until killed."""
        while True:
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                _, _, target, packet = heapq.heappop(self._due)
                self._deliver(target, packet)
            wait_s = self._due[0][0] - now if self._due else _LOOK_INTERVAL_S
            for device, _ in self._poll.poll(min(_LOOK_INTERVAL_S, wait_s)):
                self._take(device)
            self._read_rules()

    def _read_rules(self) -> None:
        try:
            changed_at = self._control.stat().st_mtime_ns
            if changed_at != self._read_at:
                self._rules = json.loads(self._control.read_text())
                self._read_at = changed_at
        except (OSError, ValueError):
            pass  # it is just being written

    def _take(self, device: int) -> None:
        source = self._hosts[device]
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(device, 1 << 16)
            except BlockingIOError:
                return
            target = self._by_ip.get(packet[16:20])
            if target is not None:
                self._carry(source, target, packet)

    def _carry(self, source: str, target: str, packet: bytes) -> None:
        at = time.monotonic()
        for host in (source, target):
            rule = self._rules.get(host, {})
            if rule.get("is_cut") or random.random() < rule.get("loss", 0.0):
                return
            at += rule.get("delay_ms", 0.0) / 1e3
        self._num_packets += 1
        heapq.heappush(self._due, (at, self._num_packets, target, packet))

    def _deliver(self, target: str, packet: bytes) -> None:
        try:
            os.write(self._devices[target], packet)
        except OSError:
            pass  # the host's queue is full, or the host is gone: as on any network


def main() -> None:
    """Make the devices, and carry."""
    control, *hosts = sys.argv[1:]
    devices = {}
    for host in hosts:
        pid, _, address = host.partition(":")
        devices[address] = make_device(int(pid), address)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    Switch(Path(control), devices).run()


if __name__ == "__main__":
    main()
