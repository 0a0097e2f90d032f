"""KV that goes from one pool's server to another's: real ones, between hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aseer.kv.settings import QUIET_LMCACHE
from tests.integration.hosts import hosts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.hosts import Hosts

pytest.importorskip("lmcache")
pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).resolve().parents[2]
KEY = "of these tests, and no others"
PIECE = 64  # tokens, of `kv_host`
HIDDEN = 512  # 4 MiB a piece


class Server:
    """A server on a host; its methods are those of `kv_host.Host`."""

    def __init__(self, number: int, prefix: tuple[str, ...], key: str) -> None:
        self._process = subprocess.Popen(
            [
                *(*prefix, sys.executable, "-m", "tests.integration.kv_host"),
                *(f"tcp://10.77.0.{number}:*", f"aseer-test-{number}", "256", key),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **QUIET_LMCACHE},
        )
        self.address = self._hear()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith(
            ('"', "{", "[", "null", *"0123456789")
        ):
            assert line, "it has ended"
        return json.loads(line)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([name, *args]) + "\n")
            self._process.stdin.flush()
            return self._hear()

        return call

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def servers(num: int = 2, **keys: str) -> Iterator[tuple[Hosts, list[Server]]]:
    with ExitStack() as stack:
        there = stack.enter_context(hosts(num))
        made = []
        for number in range(1, num + 1):
            key = keys.get(f"key{number}", KEY)
            made.append(Server(number, there[number].prefix, key))
            stack.callback(made[-1].kill)
            made[-1].register(HIDDEN)
        yield there, made


def test_what_one_server_stored_another_has_byte_for_byte():
    with servers() as (_, (source, target)):
        assert source.store(1, 8) == 8
        target.begin(source.address, 1, 8, 10.0)
        pulled = target.wait()
        assert pulled["error"] == ""
        assert pulled["tokens"] == 8 * PIECE
        sums = source.sums(1, 8)
        assert len(set(sums)) == 8
        assert target.sums(1, 8) == sums
        assert target.find(1, 8) == 8, "as an engine does"
        size = pulled["bytes"]
        assert size == 8 << 22
        counts = {"stored": 0, "pulled": size, "resident": size}
        assert target.state() == counts | {"used": size, "lent": 0}
        time.sleep(0.5)
        assert source.state()["lent"] == 0
        target.begin(source.address, 1, 8, 10.0)  # all of it is there
        assert (target.wait()["tokens"], target.state()["pulled"]) == (0, size)
        # Of what is longer only the rest comes; of what nobody has, nothing.
        source.store(1, 10)
        target.begin(source.address, 1, 10, 10.0)
        assert target.wait()["tokens"] == 2 * PIECE
        assert target.sums(1, 10) == source.sums(1, 10)
        target.begin(source.address, 7, 4, 10.0)
        assert (target.wait()["tokens"], target.state()["used"]) == (0, 10 << 22)


def test_a_source_that_is_cut_off_in_the_middle_costs_no_more_than_the_time_allowed():
    with servers() as (there, (source, target)):
        there[1].run("tc qdisc add dev eth0 root tbf rate 100mbit burst 256k limit 1m")
        source.store(1, 8)
        target.begin(source.address, 1, 8, 2.0)
        time.sleep(1.0)
        there.cut(1)
        pulled = target.wait()
        assert 1.9 < pulled["seconds"] < 2.5
        assert "longer than 2 s" in pulled["error"]
        assert 0 < pulled["tokens"] < 8 * PIECE
        num = pulled["tokens"] // PIECE
        assert target.sums(1, 8) == source.sums(1, 8)[:num], "what came is whole"
        assert target.state()["used"] == num << 22, "and nothing else is kept"
        time.sleep(7.0)
        assert source.state()["lent"] == 0, "it does not wait for ever, either"


def test_a_source_that_is_gone_or_has_another_key_or_layout_gives_nothing():
    with servers(3, key3=KEY + " but one") as (_, (source, target, stranger)):
        source.store(1, 2)
        stranger.store(1, 2)
        target.begin(stranger.address, 1, 2, 2.0)
        pulled = target.wait()
        assert (pulled["tokens"], pulled["seconds"] < 2.5) == (0, True)
        assert pulled["error"]
        source.register(HIDDEN // 2, 2)
        target.begin(source.address, 1, 2, 2.0)
        assert "layout" in target.wait()["error"]
        source.kill()
        target.begin(source.address, 1, 2, 2.0)
        pulled = target.wait()
        assert (pulled["tokens"], pulled["seconds"] < 1.0) == (0, True)
        assert target.state()["used"] == 0


def test_what_has_no_room_is_not_taken():
    with servers() as (_, (source, target)):
        for seed in (1000, 3000):
            target.store(seed, 30)
        source.store(1, 8)
        target.begin(source.address, 1, 8, 2.0)
        assert "no room" in target.wait()["error"]
