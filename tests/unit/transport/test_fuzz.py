"""Tens of thousands of frames of nonsense, the same each time, at both ends.

Half of them are messages with random values, which decode; the others are such messages
with bytes changed or cut, random MessagePack, random bytes, and wrong numbers of
frames. No exception escapes, nothing grows, and what makes sense works on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from array import array
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

import aseer
from aseer.core.columns import Columns
from aseer.counts import DraftCounts, KvCounts
from aseer.instance.base import InstanceSpec
from aseer.instance.main import Instance
from aseer.instance.messages import (
    FROM_INSTANCE,
    TO_INSTANCE,
    AbortChunks,
    Answer,
    Ask,
    Failed,
    Hello,
    Report,
    Run,
    Stop,
)
from aseer.instance.sim import SimBackend
from aseer.node.machine import Launch
from aseer.runtime.instances import InstancePool
from aseer.runtime.recorder import Recorder
from aseer.transport.base import PROTOCOL_VERSION
from aseer.transport.memory import MemoryRouter
from aseer.types import (
    Chunk,
    ChunkEnd,
    ChunkId,
    GroupId,
    InstanceId,
    InstanceInfo,
    InstanceLoad,
    RequestId,
)
from tests.unit.builders import controller_of, info_of, task_of
from tests.unit.runtime.machine import node_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aseer.controller import Controller
    from aseer.instance.messages import FromInstance

NUM_FRAMES = 20_000  # at each end
NUM_WARM = 5_000
# What Python allocates for itself between two counts.
MAX_GROWTH = 500


class Nonsense:
    """Frames, most of which are nearly messages."""

    def __init__(self, seed: int, messages: list[Callable[[Nonsense], Any]]) -> None:
        self._rng = random.Random(seed)
        self._messages = messages
        self._encoder = msgspec.msgpack.Encoder()

    def below(self, end: int) -> int:
        """As `randrange`, in a fifth of its time."""
        return int(self._rng.random() * end)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self._rng.random() * len(options))]

    def frames(self) -> list[bytes]:
        rng = self._rng
        data = bytearray(self._encoder.encode(self.pick(self._messages)(self)))
        match self.below(10):
            case 0:
                del data[self.below(len(data)) :]
            case 1:
                for _ in range(1 + self.below(4)):
                    data[self.below(len(data))] = self.below(256)
            case 2:
                data = bytearray(self._encoder.encode(self.value(4)))
            case 3:
                data = bytearray(rng.randbytes(self.pick([0, 1, 9, 300])))
            case 4:
                return [rng.randbytes(3)] * self.pick([0, 2, 2, 3])
        return [bytes(data)]

    def value(self, depth: int) -> Any:
        """Anything that MessagePack has."""
        kind = self.below(7 if depth else 5)
        if kind == 5:
            return [self.value(depth - 1) for _ in range(self.below(4))]
        if kind == 6:
            return {self.text(): self.value(depth - 1) for _ in range(self.below(4))}
        return [None, True, self.number(), self.bytes(), self.text()][kind]

    def number(self) -> int:
        return self.pick([0, 1, 2, 3, 5, 8, -1, 40, 2**31, -(10**6), 2**63 - 1])

    def small(self) -> int:
        return self.below(7) - 1

    def real(self) -> float:
        return self.pick([0.0, 1.0, -1.0, float("inf"), float("nan"), 1e300])

    def bytes(self) -> bytes:
        return self._rng.randbytes(self.pick([0, 3, 4, 8, 12]))

    def text(self) -> str:
        return self.pick(["", "a", "type", "report", "äé", "🙂" * 5])

    def numbers(self) -> tuple[int, ...]:
        return tuple(self.number() for _ in range(self.below(4)))


def an_end(n: Nonsense) -> ChunkEnd:
    reasons = ["stop", "length", "aborted", "error"]
    return ChunkEnd(
        reason=n.pick(reasons),
        stop_reason=n.pick([None, n.number(), n.text()]),
        error=n.pick([None, n.text()]),
        held_text=n.text(),
    )


def columns(n: Nonsense) -> Columns:
    """Of chunks that run; sometimes one column is another's, or none."""
    rng = n._rng
    num = n.below(4)
    counts = [n.pick([-1, 0, 1, 2]) for _ in range(num)]
    values = rng.randbytes(4 * sum(max(0, count) for count in counts))
    ids = [n.pick([n.number(), n.below(2000)]) for _ in range(num)]
    sense: dict[str, Any] = {
        "chunk_ids": array("q", ids).tobytes(),
        "starts": array("i", [n.pick([0, 0, 1, -1]) for _ in ids]).tobytes(),
        "counts": array("i", counts).tobytes(),
        "tokens": values,
        "logprobs": values,
    }
    if n.below(2):
        sense["text_starts"] = bytes(4 * num)
        sense["text_counts"] = array("i", [2] * num).tobytes()
        sense["text"] = rng.randbytes(2 * num)
    if not n.below(4):
        sense[n.pick(list(sense))] = n.bytes()
    return Columns(
        **sense,
        cached=[(n.small(), n.number()) for _ in range(n.below(3))],
        ends=[(n.small(), an_end(n)) for _ in range(n.below(3))],
    )


def a_report(n: Nonsense) -> Report:
    drafts = DraftCounts(
        num_drafts=n.number(),
        drafted=n.numbers(),
        accepted=n.numbers(),
        step_s=n.real(),
        share_buckets=n.numbers(),
    )
    kv = KvCounts(
        stored_tokens=n.number(),
        loaded_tokens=n.number(),
        load_s=n.real(),
        load_buckets=n.numbers(),
        prefill_s=n.real(),
    )
    load = InstanceLoad(
        num_running=n.number(),
        kv_used=n.real(),
        num_preemptions=n.number(),
        drafts=n.pick([None, drafts]),
        kv=n.pick([None, kv]),
    )
    return Report(columns(n), load)


FROM = [
    a_report,
    a_report,
    lambda n: Answer(n.number(), n.value(3), n.text()),
    lambda n: Failed(n.text()),
    lambda n: Hello(
        n.pick([PROTOCOL_VERSION, n.number()]),
        InstanceInfo(
            instance_id=InstanceId(n.number()),
            num_kv_blocks=n.number(),
            block_size=n.number(),
            max_num_seqs=n.number(),
            max_model_len=n.number(),
        ),
    ),
]


class Owner:
    """What a rollout does with reports; see `Session`."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.recorder = Recorder(controller, "fcfs", 8, 0)
        self.now = 0.0

    def instance_up(self, info: InstanceInfo) -> None:
        raise AssertionError(info)

    def instance_report(self, instance_id: InstanceId, report: Report) -> None:
        self.now += 0.001
        self.controller.progress(report.chunks, self.now)
        self.recorder.count_tokens(instance_id)
        self.recorder.sample(instance_id, report.load, self.now)
        self.recorder.progress(self.now, intake_open=True)

    def instance_down(
        self, instance_id: InstanceId, why: str, partners: Sequence[InstanceId] = ()
    ) -> None:
        raise AssertionError(why)

    def instance_left(self, instance_id: InstanceId, why: str) -> None:
        raise AssertionError(why)

    def instances_exhausted(self, why: str) -> None:
        raise AssertionError(why)


async def shower_a_pool() -> None:
    """As an instance that runs chunks of a rollout."""
    router: MemoryRouter[FromInstance] = MemoryRouter(FROM_INSTANCE)
    controller = controller_of(policy="fcfs", max_request_retries=10**9)
    owner = Owner(controller)
    launch = Launch(instance_id=0, backend="sim", engine_args={}, env={}, share="all")
    config = aseer.EngineConfig(model="sim", device="sim")
    pool = InstancePool(config, [launch], node_of(router), owner)
    (slot,) = pool._slots.values()
    pool._slots.begin_incarnation(slot)
    slot.up.set()
    owner.recorder.instance_up(info_of(), InstanceLoad())
    controller.instance_up(info_of(), 0.0)
    controller.add_groups([task_of("g", num_requests=8, max_tokens=10**6)], 0.0)
    lost: list[str] = []
    read = asyncio.Event()

    def on_message(peer: bytes, message: FromInstance) -> None:
        if peer == b"end":
            read.set()
        pool.on_message(peer, message)

    nonsense = Nonsense(0, FROM)  # type: ignore[arg-type]
    with (
        router.connect(slot.identity, TO_INSTANCE) as dealer,
        router.connect(b"end", TO_INSTANCE) as end,
    ):
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(
                router.run(on_message, lambda _, why: lost.append(why))
            )
            num_objects = 0
            for num in (NUM_WARM, NUM_FRAMES - NUM_WARM):
                for _ in range(num):
                    await dealer.send_frames(nonsense.frames())
                read.clear()
                await end.send(Failed(""))
                await read.wait()
                grown, num_objects = len(gc.get_objects()) - num_objects, num_objects
                num_objects += grown
            running.cancel()
    assert lost == []
    assert grown < MAX_GROWTH
    controller.check_integrity()
    assert controller.running.num_on(InstanceId(0)) > 0, "reports reached its chunks"
    assert controller.counters.num_output_tokens > 0
    assert slot.asked == {}
    assert len(pool._slots._by_identity) == 1


def a_chunk(n: Nonsense) -> Chunk:
    sampling: dict[str, Any] = {"temperature": n.small(), "ignore_eos": n.value(0)}
    if n._rng.random() < 0.3:
        sampling[n.text()] = n.value(2)
        sampling.pop(n.pick(["temperature", "ignore_eos"]))
    return Chunk(
        chunk_id=ChunkId(n.below(50)),
        request_id=RequestId(n.pick("abc")),
        group_id=GroupId(n.text()),
        instance_id=InstanceId(n.number()),
        prompt=n.bytes(),
        generated=n.bytes(),
        max_tokens=n.small(),
        min_tokens=n.number(),
        sampling=sampling,
        seed=n.pick([None, n.number()]),
        num_reserved_blocks=n.number(),
    )


QUESTIONS = ["describe_weights", "prepare_weights", "commit_weights", "sleep", "wake"]
TO = [
    lambda n: Run(a_chunk(n)),
    lambda n: Run(a_chunk(n)),
    lambda n: AbortChunks([ChunkId(n.pick([n.number(), n.below(50)]))]),
    lambda n: Ask(
        n.number(),
        n.pick(QUESTIONS),
        n.pick([{}, {"index": n.text()}, {"level": 1}, {n.text(): n.value(2)}]),
    ),
]


async def shower_an_instance() -> None:
    """As a controller."""
    router: MemoryRouter[FromInstance] = MemoryRouter(FROM_INSTANCE)
    spec = InstanceSpec(
        endpoint="",
        identity="0.1",
        instance_id=0,
        backend="sim",
        report_interval_s=0.05,
        engine_args={"step_s": 0.0, "max_num_seqs": 4},
    )
    backend = SimBackend(spec)
    answers: asyncio.Queue[int] = asyncio.Queue()
    ended: asyncio.Queue[ChunkEnd] = asyncio.Queue()

    def on_message(peer: bytes, message: FromInstance) -> None:
        if isinstance(message, Answer):
            answers.put_nowait(message.ask_id)
        elif isinstance(message, Report):
            for chunk_id, end in message.chunks.ended():
                if chunk_id == 1000:
                    ended.put_nowait(end)

    nonsense = Nonsense(1, TO)  # type: ignore[arg-type]
    with router.connect(b"0.1", TO_INSTANCE) as dealer:
        instance = Instance(backend, dealer, spec.report_interval_s)
        async with asyncio.TaskGroup() as tasks:
            talking = tasks.create_task(router.run(on_message))
            working = tasks.create_task(instance.serve())
            num_objects = 0
            for num in (NUM_WARM, NUM_FRAMES - NUM_WARM):
                for i in range(num):
                    dealer.down.carry(nonsense.frames())
                    if i % 500 == 499:
                        router.send(b"0.1", Ask(-(10**7) - i, "discard_weights", {}))
                        while await answers.get() != -(10**7) - i:
                            pass  # what changed bytes asked
                grown, num_objects = len(gc.get_objects()) - num_objects, num_objects
                num_objects += grown
            backend._sleeping.clear()
            chunk = a_chunk(nonsense)
            chunk.chunk_id, chunk.prompt, chunk.max_tokens = ChunkId(1000), bytes(8), 3
            chunk.sampling = {"temperature": 0.0, "ignore_eos": True}
            chunk.generated = b""
            router.send(b"0.1", Run(chunk))
            last = await ended.get()
            router.send(b"0.1", Stop())
            await working
            talking.cancel()
    assert last.reason == "length", last
    assert grown < MAX_GROWTH
    assert instance._running == {}
    assert len(instance._pending) <= 50


@pytest.mark.parametrize("shower", [shower_a_pool, shower_an_instance])
def test_nonsense_ends_nothing_and_leaves_nothing(
    shower: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "aseer")  # an instance's log has every error
    asyncio.run(shower(), debug=False)
