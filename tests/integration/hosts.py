"""Hosts on one machine: each with a network, /dev/shm and processes of its own.

Their links meet at a bridge in a namespace of its own, so that the machine's network is
not touched. Needs the right to make namespaces (root, or CAP_SYS_ADMIN).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_TOOLS = ("unshare", "nsenter", "setpriv", "ip")
_NAMESPACES = ("--net", "--mount", "--uts", "--pid")


class Namespace:
    """Namespaces that are there as long as a process sleeps in them."""

    def __init__(self, name: str) -> None:
        self.name = name
        script = (
            f"hostname {name} && ip link set lo up && "
            "mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm && "
            "echo ready && exec sleep infinity >/dev/null"
        )
        flags = ("--fork", "--kill-child", "--mount-proc", "--propagation", "private")
        self._holder = subprocess.Popen(
            ["unshare", *_NAMESPACES, *flags, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        is_ready = self._holder.stdout.readline() == b"ready\n"
        if not is_ready:
            _, error = self._holder.communicate()
            pytest.skip(f"no namespaces are to be had here: {error.decode()[:200]}")
        children = f"/proc/{self._holder.pid}/task/{self._holder.pid}/children"
        with open(children) as file:
            self._pid = int(file.read())

    @property
    def pid(self) -> int:
        """Of its first process, as seen from outside."""
        return self._pid

    @property
    def prefix(self) -> tuple[str, ...]:
        """Of a command that is to run there, and to end with whoever started it."""
        enter = ("nsenter", "-t", str(self._pid), *_NAMESPACES, f"--wd={os.getcwd()}")
        return (*enter, "setpriv", "--pdeathsig", "KILL", "--")

    def run(self, command: str) -> None:
        """Run a command there to its end, as words."""
        inside = ("nsenter", "-t", str(self._pid), *_NAMESPACES)
        subprocess.run([*inside, *command.split()], check=True)

    def kill(self) -> None:
        """As if the power went: every process there is gone."""
        self._holder.kill()
        self._holder.communicate()


class Hosts:
    """Hosts number 1 and up, each at 10.77.0.NUMBER."""

    def __init__(self, switch: Namespace, hosts: list[Namespace]) -> None:
        self._switch = switch
        self._hosts = hosts

    def __getitem__(self, number: int) -> Namespace:
        return self._hosts[number - 1]

    def cut(self, number: int) -> None:
        """What a host sends, and what is sent to it, is gone, and nobody is told."""
        self._switch.run(f"ip link set h{number} down")

    def heal(self, number: int) -> None:
        """Its link works again."""
        self._switch.run(f"ip link set h{number} up")

    def part(self, *numbers: int) -> None:
        """What these hosts send each other is gone, and nobody is told; what they send
        to others is not.
        """
        self._isolate("on", numbers)

    def join(self, *numbers: int) -> None:
        """They reach each other again."""
        self._isolate("off", numbers)

    def _isolate(self, how: str, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            self._switch.run(f"ip link set h{number} type bridge_slave isolated {how}")


class LossyHosts:
    """Hosts number 1 and up, each at 10.77.0.NUMBER, behind a switch that loses."""

    def __init__(self, hosts: list[Namespace], control: Path, **always: float) -> None:
        self._hosts = hosts
        self._control = control
        self._rules: dict[str, dict[str, Any]] = {
            f"10.77.0.{i}": {**always, "is_cut": False}
            for i in range(1, len(hosts) + 1)
        }
        self._write()

    def __getitem__(self, number: int) -> Namespace:
        return self._hosts[number - 1]

    def cut(self, number: int) -> None:
        """See `Hosts`."""
        self._set_cut(number, True)

    def heal(self, number: int) -> None:
        """See `Hosts`."""
        self._set_cut(number, False)

    def _set_cut(self, number: int, is_cut: bool) -> None:
        self._rules[f"10.77.0.{number}"]["is_cut"] = is_cut
        self._write()

    def _write(self) -> None:
        new = self._control.with_suffix(".new")
        new.write_text(json.dumps(self._rules))
        new.replace(self._control)


@contextmanager
def lossy_hosts(num: int, control: Path, **always: float) -> Iterator[LossyHosts]:
    """So many hosts, between which packets are lost; see `hosts`.

    Args:
        control: a file for the switch. always: `loss` and `delay_ms` of each host.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"hosts need {', '.join(missing)}")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("lossy hosts need /dev/net/tun")
    with ExitStack() as stack:
        made = []
        for i in range(1, num + 1):
            made.append(Namespace(f"node{i}"))
            stack.callback(made[-1].kill)
        found = LossyHosts(made, control, **always)
        ends = [f"{host.pid}:10.77.0.{i}" for i, host in enumerate(made, 1)]
        switch = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.wire", str(control), *ends],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        stack.callback(switch.communicate)
        stack.callback(switch.kill)
        assert switch.stdout is not None
        if switch.stdout.readline() != b"ready\n":
            pytest.skip("no devices are to be had here")
        yield found


@contextmanager
def hosts(num: int) -> Iterator[Hosts]:
    """So many hosts; all that runs there is gone at the end.

    Skips the test where they are not to be had.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"hosts need {', '.join(missing)}")
    with ExitStack() as stack:
        made = []
        for name in ("switch", *(f"node{i + 1}" for i in range(num))):
            made.append(Namespace(name))
            stack.callback(made[-1].kill)
        switch, *rest = made
        switch.run("ip link add br0 type bridge forward_delay 0 mcast_snooping 0")
        switch.run("ip link set br0 up")
        for i, host in enumerate(rest, 1):
            # Named from outside: a process's id is another one inside.
            add = f"ip link add eth0 type veth peer name h{i} netns {switch.pid}"
            enter = ("nsenter", "-t", str(host.pid), "--net")
            subprocess.run([*enter, *add.split()], check=True)
            switch.run(f"ip link set h{i} master br0 up")
            host.run(f"ip addr add 10.77.0.{i}/24 dev eth0")
            host.run("ip link set eth0 up")
        yield Hosts(switch, rest)
