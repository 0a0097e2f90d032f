"""A crowd of simulated engines in one process, for `bench_controller.py`.

Each has the sockets of a real one, to the controller and to its draft server, and says
what a real one would: a hello, reports of all its chunks in columns, ends of chunks,
questions for what siblings wrote. Nothing is computed: tokens are drawn from a table.

The process is told what to do on standard input, a line of JSON each: the specs of the
engines, then how many rounds to go. In a round every engine takes what it was sent,
and reports once.
"""

from __future__ import annotations

import itertools
import mmap
import random
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import zmq

from aseer.core.columns import Columns
from aseer.counts import DRAFTING_SHARES, DraftCounts
from aseer.dgds.messages import TO_CLIENT, FetchCst, GroupEntry, RegisterGroups
from aseer.instance.base import InstanceSpec
from aseer.instance.messages import Hello, Report
from aseer.transport.base import PROTOCOL_VERSION
from aseer.types import ChunkEnd, InstanceId, InstanceInfo, InstanceLoad

if TYPE_CHECKING:
    from collections.abc import Iterator

_TABLE = 1 << 20  # tokens that reports are cut from
_PAUSE_S = 0.0005
_ENCODER = msgspec.msgpack.Encoder()


class Settings(msgspec.Struct, kw_only=True):
    """What the crowd is and how much it says.

    Attributes:
        tokens: of each chunk in a report; bytes_per_token: of its text.
        share_finished: of the chunks that end, those that end their request.
        window: reports that may be on their way to the controller.
        counter: file in which the controller counts the reports it has taken.
    """

    chunks: int
    tokens: int
    bytes_per_token: int
    share_finished: float
    window: int
    counter: str
    endpoint: str
    drafts: str
    seed: int


class Go(msgspec.Struct):
    """So many rounds; in each, so many chunks of every engine end, and maybe it asks
    what siblings wrote.
    """

    rounds: int
    ends: int
    fetches: bool


class Done(msgspec.Struct):
    """The rounds are over; sums over them, and the chunks that run now."""

    num_reports: int
    num_ends: int
    num_fetches: int
    num_asked: int
    num_given: int
    report_bytes: int
    num_running: int


class _Chunk(msgspec.Struct):
    chunk_id: int
    request_id: str
    group_id: str
    rollout_id: int
    generated: bytes


class _Told(msgspec.Struct):
    """A `Run`, of which an engine of the crowd needs no more; others have no chunk."""

    chunk: _Chunk | None = None


_TOLD = msgspec.msgpack.Decoder(_Told)


class _Running(NamedTuple):
    group_id: str
    request_id: str
    num_before: int


class _Texts:
    """Where the tokens that are reported come from."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.tokens = draw.integers(0, 150_000, _TABLE, np.int32).tobytes()
        self.logprobs = (-draw.random(_TABLE, np.float32)).tobytes()
        self.text = b"word" * _TABLE


class _Engine:
    """One engine: its chunks in columns, and the groups it drafts for."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], spec: InstanceSpec, given: Crowd
    ) -> None:
        self._settings = given.settings
        self._texts, self._random = given.texts, given.random
        self._done = given.done
        self.instance_id = spec.instance_id
        self._socket = _dealer(context, self._settings.endpoint, spec.identity)
        self._drafts = _dealer(context, self._settings.drafts, spec.identity)
        self._ids = np.zeros(self._settings.chunks, np.int64)
        self._starts = np.zeros(self._settings.chunks, np.int32)
        self._running: list[_Running] = []  # in the order of the columns, oldest first
        self._cached: list[int] = []  # chunks that have not said what they found
        self._groups: dict[str, dict[str, int]] = {}
        self._in_group: dict[str, int] = {}  # chunks that run
        self._unregistered: list[str] = []
        self._is_waiting = False  # for an answer, before which nothing else is asked
        self._drafted = DraftCounts(
            drafted=(9, 7, 5, 3),
            accepted=(6, 4, 2, 1),
            share_buckets=tuple(range(len(DRAFTING_SHARES) + 1)),
        )
        info = InstanceInfo(
            instance_id=InstanceId(spec.instance_id),
            num_kv_blocks=1 << 20,
            block_size=16,
            max_num_seqs=self._settings.chunks,
            max_model_len=1 << 20,
            shares_prompts=True,
            model="sim",
            device="sim",
        )
        self._socket.send(_ENCODER.encode(Hello(PROTOCOL_VERSION, info)))

    @property
    def num_running(self) -> int:
        return len(self._running)

    def take(self) -> None:
        """Begin what the controller has sent."""
        while (data := _received(self._socket)) is not None:
            chunk = _TOLD.decode(data).chunk
            if chunk is None:
                continue
            place = len(self._running)
            self._ids[place], self._starts[place] = chunk.chunk_id, 0
            prefix = f"{chunk.rollout_id}:"
            group_id = prefix + chunk.group_id
            running = _Running(
                group_id, prefix + chunk.request_id, len(chunk.generated) // 4
            )
            self._running.append(running)
            self._cached.append(chunk.chunk_id)
            if group_id not in self._groups:
                self._groups[group_id] = {}
                self._unregistered.append(group_id)
            self._in_group[group_id] = self._in_group.get(group_id, 0) + 1
            self._groups[group_id][running.request_id] = running.num_before

    def report(self, num_ends: int) -> None:
        """Say what all chunks have generated; the oldest of them end."""
        num, settings = len(self._running), self._settings
        num_ends = min(num_ends, num)
        size = num * settings.tokens
        at = self._random.randrange(_TABLE - size)
        counts = np.full(num, settings.tokens, np.int32)
        places = {int(chunk_id): i for i, chunk_id in enumerate(self._ids[:num])}
        num_text = settings.bytes_per_token * settings.tokens
        columns = Columns(
            chunk_ids=self._ids[:num].tobytes(),
            starts=self._starts[:num].tobytes(),
            counts=counts.tobytes(),
            tokens=self._texts.tokens[4 * at : 4 * (at + size)],
            logprobs=self._texts.logprobs[4 * at : 4 * (at + size)],
            text_starts=(self._starts[:num] * settings.bytes_per_token).tobytes(),
            text_counts=np.full(num, num_text, np.int32).tobytes(),
            text=self._texts.text[: num * num_text],
            cached=[(places[c], 0) for c in self._cached],
            ends=[(i, self._end()) for i in range(num_ends)],
        )
        self._cached.clear()
        self._starts[:num] += settings.tokens
        load = InstanceLoad(num_running=num, kv_used=0.5, drafts=self._count_drafts())
        data = _ENCODER.encode(Report(columns, load))
        self._socket.send(data)
        for i, running in enumerate(self._running):
            known = running.num_before + int(self._starts[i])
            self._groups[running.group_id][running.request_id] = known
        for _ in range(num_ends):
            self._in_group[self._running.pop(0).group_id] -= 1
        self._ids[: num - num_ends] = self._ids[num_ends:num]
        self._starts[: num - num_ends] = self._starts[num_ends:num]
        self._done.num_reports += 1
        self._done.num_ends += num_ends
        self._done.report_bytes += len(data)

    @property
    def is_waiting(self) -> bool:
        """Whether it has asked for what siblings wrote, and was not answered."""
        return self._is_waiting

    def take_drafts(self) -> None:
        """Take what siblings wrote."""
        while (data := _received(self._drafts)) is not None:
            self._is_waiting = False
            for delta in TO_CLIENT.decode(data).groups:
                group = self._groups[delta.group_id]
                if not delta.is_known and not self._in_group[delta.group_id]:
                    del self._groups[delta.group_id], self._in_group[delta.group_id]
                for row in delta.requests:
                    self._done.num_given += len(row.tokens) // 4
                    known = row.start + len(row.tokens) // 4
                    group[row.request_id] = max(group.get(row.request_id, 0), known)

    def fetch(self) -> None:
        """Take what siblings wrote, and ask for more."""
        self.take_drafts()
        if self._unregistered:
            entries = [GroupEntry(g, g.encode(), 600.0) for g in self._unregistered]
            self._drafts.send(_ENCODER.encode(RegisterGroups(entries)))
            self._unregistered.clear()
        if self._groups and not self._is_waiting:
            self._is_waiting = True
            self._drafts.send(_ENCODER.encode(FetchCst(self._groups)))
            self._done.num_fetches += 1
            self._done.num_asked += sum(map(len, self._groups.values()))

    def close(self) -> None:
        self._socket.close(linger=0)
        self._drafts.close(linger=0)

    def _end(self) -> ChunkEnd:
        is_over = self._random.random() < self._settings.share_finished
        return ChunkEnd(reason="stop" if is_over else "length")

    def _count_drafts(self) -> DraftCounts:
        num = self._drafted.num_drafts + self.num_running
        self._drafted = replace(self._drafted, num_drafts=num)
        return self._drafted


class Crowd:
    """All engines, and the pace at which they report."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.texts = _Texts(settings.seed)
        self.random = random.Random(settings.seed)
        self.done = Done(0, 0, 0, 0, 0, 0, 0)
        self._num_sent = 0
        with Path(settings.counter).open("r+b") as file:
            self._taken = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")

    def run(self, lines: Iterator[bytes]) -> None:
        """Do what the lines say, to the last."""
        with zmq.Context() as context:
            context.set(zmq.MAX_SOCKETS, 1 << 14)
            engines: list[_Engine] = []
            for line in lines:
                if b'"rounds"' not in line:
                    spec = msgspec.json.decode(line, type=InstanceSpec)
                    engines.append(_Engine(context, spec, self))
                    continue
                go = msgspec.json.decode(line, type=Go)
                self._go(engines, go)
                self.done.num_running = sum(e.num_running for e in engines)
                sys.stdout.buffer.write(msgspec.json.encode(self.done) + b"\n")
                sys.stdout.flush()
            for engine in engines:
                engine.close()

    def _go(self, engines: list[_Engine], go: Go) -> None:
        # In place: the engines count there, too.
        for name in Done.__struct_fields__:
            setattr(self.done, name, 0)
        for _, engine in itertools.product(range(go.rounds), engines):
            engine.take()
            if engine.num_running:
                while self._num_sent - self._taken[0] >= self.settings.window:
                    time.sleep(_PAUSE_S)
                self._num_sent += 1
                engine.report(go.ends)
                if go.fetches:
                    engine.fetch()
        while self._num_sent > self._taken[0]:
            time.sleep(_PAUSE_S)
        for engine in engines:
            engine.take()
            while engine.is_waiting:  # the next rounds are not to pay for these
                engine.take_drafts()
                time.sleep(_PAUSE_S)


def _dealer(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: str
) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.set(zmq.IDENTITY, identity.encode())
    socket.connect(endpoint)
    return socket


def _received(socket: zmq.Socket[bytes]) -> bytes | None:
    try:
        return socket.recv(zmq.NOBLOCK)
    except zmq.Again:
        return None


def allow_many_files() -> None:
    """Let this process have as many sockets as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    allow_many_files()
    Crowd(msgspec.json.decode(sys.argv[1], type=Settings)).run(iter(sys.stdin.buffer))
