"""Do weights go faster from host to host over several connections than over one?

Two hosts, which are network namespaces of this machine: one gives the blocks of a file
in its /dev/shm, and one fetches them, with the code of `aseer node` (`Fetching`, and
encrypted connections). Over `streams` connections blocks take turns; each connection
has threads of ZeroMQ's of its own at both ends, which encrypt. `rate` is megabytes a
second until all blocks are written, `cpu_ms_per_mb` what both processes took of cores
for each, and `cores` how many they kept busy in the mean. Arms take turns; the first
fetch of each is not counted.

Expected on two cores that both ends share: `two_of_one` and `four_of_one` of about 1,
and `cpu_ms_per_mb` the same for all, since what bounds the rate is the cores' time, of
which streams save nothing. Where each end has cores to spare it says what several
connections would gain.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from common import ROOT, print_result, quantiles, result_line

STREAMS = (1, 2, 4)
KEY = "of this benchmark, and no others"
FOLDER = "1"


def say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def digest_key() -> bytes:
    return bytes(32)


def make_file(path: Path, num_bytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(num_bytes >> 20):
            file.write(os.urandom(1 << 20))


async def give(path: Path) -> None:
    """Be who gives a file: at as many addresses as there may be streams.

    Says what it has taken of cores for each line that it is told.
    """
    from aseer.node.fetching import block_of
    from aseer.node.messages import TO_NEIGHBOUR, GetBlock
    from aseer.transport.keys import derive_keys
    from aseer.transport.tcp import bind_tcp

    loop = asyncio.get_running_loop()
    keys = derive_keys(KEY.encode())
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        endpoints = []
        for _ in range(max(STREAMS)):
            router = await stack.enter_async_context(
                bind_tcp("tcp://10.77.0.1:*", TO_NEIGHBOUR, keys)
            )
            endpoints.append(router.endpoint)

            def on_asked(peer: bytes, asked: GetBlock, router: Any = router) -> None:
                router.send(peer, block_of(asked, str(path), digest_key()))

            def nothing(*_: object) -> None:
                pass

            tasks.create_task(router.run(on_asked, nothing, nothing))
        say(endpoints)
        while await loop.run_in_executor(None, sys.stdin.readline):
            say(time.process_time())
        os._exit(0)


async def fetch(endpoints: list[str], num_bytes: int) -> tuple[float, float]:
    """Fetch the file over so many streams; seconds, and those of cores."""
    from aseer.node.fetching import Fetching
    from aseer.node.messages import FROM_NEIGHBOUR, Fetched, FetchFiles, GetBlock
    from aseer.transport.keys import derive_keys
    from aseer.transport.tcp import connect_tcp

    keys, done = derive_keys(KEY.encode()), asyncio.Event()
    queues: list[asyncio.Queue[GetBlock]] = [asyncio.Queue() for _ in endpoints]
    num_asked = 0

    def ask(wanted: GetBlock) -> None:
        nonlocal num_asked
        queues[num_asked % len(queues)].put_nowait(wanted)
        num_asked += 1

    def hear(message: object) -> None:
        if message != Fetched(FOLDER):
            raise RuntimeError(f"it was not fetched: {message}")
        done.set()

    order = FetchFiles(FOLDER, [num_bytes], "index", b"", digest_key())
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        fetching = Fetching(order, Path(folder) / FOLDER, hear, ask)
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            working = []
            for i, endpoint in enumerate(endpoints):
                name = b"a%d" % i + os.urandom(8)
                dealer = await stack.enter_async_context(
                    connect_tcp(endpoint, name, FROM_NEIGHBOUR, keys)
                )

                async def send(dealer: Any = dealer, queue: Any = queues[i]) -> None:
                    while True:
                        await dealer.send(await queue.get())

                async def take(dealer: Any = dealer) -> None:
                    while True:
                        fetching.take(await dealer.receive())

                working += [tasks.create_task(send()), tasks.create_task(take())]
            began_s, began_cpu_s = time.monotonic(), time.process_time()
            await fetching.begin()
            await done.wait()
            took_s, cpu_s = (
                time.monotonic() - began_s,
                time.process_time() - began_cpu_s,
            )
            for task in working:
                task.cancel()
        fetching.close()
    return took_s, cpu_s


class Giver:
    """Who gives, on a host."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT
        )
        self.endpoints = self._hear()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def cpu_s(self) -> float:
        """What it has taken of cores."""
        assert self._process.stdin is not None
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        return float(self._hear())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(args: argparse.Namespace) -> list[dict[str, float]]:
    """Each fetch that counts."""
    from tests.integration.hosts import hosts

    num_bytes = args.megabytes << 20
    script = [sys.executable, str(Path(__file__).resolve())]
    found = []
    with hosts(2) as there:
        giver = Giver([*there[1].prefix, *script, "--give", str(num_bytes)])
        try:
            for repeat in range(args.repeats + 1):
                for streams in STREAMS:
                    told = json.dumps([giver.endpoints[:streams], num_bytes])
                    before_s = giver.cpu_s()
                    said = subprocess.run(
                        [*there[2].prefix, *script, "--fetch", told],
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                        cwd=ROOT,
                    ).stdout
                    took_s, cpu_s = json.loads(said)
                    cpu_s += giver.cpu_s() - before_s
                    one = {"streams": streams, "took_s": took_s, "cpu_s": cpu_s}
                    sys.stderr.write(f"{one}\n")
                    if repeat:
                        found.append(one)
        finally:
            giver.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", help="file for the result")
    parser.add_argument("--smoke", action="store_true", help="once, and little")
    parser.add_argument("--give", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fetch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.give is not None:
        path = Path("/dev/shm/weights")
        make_file(path, args.give)
        asyncio.run(give(path))
        return
    if args.fetch is not None:
        say(asyncio.run(fetch(*json.loads(args.fetch))))
        return
    if args.smoke:
        args.megabytes, args.repeats = 8, 1
    found = measure(args)
    figures: dict[str, Any] = {}
    for streams in STREAMS:
        arm = [each for each in found if each["streams"] == streams]
        rates = [args.megabytes / each["took_s"] for each in arm]
        cpu_ms = [1000 * each["cpu_s"] / args.megabytes for each in arm]
        figures[f"rate_of_{streams}"] = quantiles(rates, 1)
        figures[f"cpu_ms_per_mb_of_{streams}"] = quantiles(cpu_ms, 2)
        cores = [each["cpu_s"] / each["took_s"] for each in arm]
        figures[f"cores_of_{streams}"] = quantiles(cores, 2)
    for name, streams in (("two", 2), ("four", 4)):
        one = figures["rate_of_1"]["median"]
        ratio = figures[f"rate_of_{streams}"]["median"] / one
        figures[f"{name}_of_one"] = round(ratio, 3)
    settings = {"megabytes": args.megabytes, "repeats": args.repeats}
    line = result_line("streams", settings=settings, figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
