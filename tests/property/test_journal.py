"""A journal that is cut or changed anywhere is a rollout at some moment, or is refused.

First frames alone; then the controller's own machine, whose trainer dies: what a new
controller makes of the journal, cut at any byte, must end with every response once, and
with those that were finished as they were (I1, I11).
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from aseer.controller import Controller
from aseer.core.columns import columns_of
from aseer.journal.frames import frame_of, frames_in, is_followed
from aseer.journal.history import History, Weights, read
from aseer.journal.keys import KeyMaker
from aseer.journal.ledger import Ledger
from aseer.journal.records import encode
from tests.property.test_controller_machine import ControllerMachine
from tests.unit.builders import chunks_in, finished_in, info_of, report_of, task_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from aseer.core.commands import Command
    from aseer.journal.records import Record
    from aseer.types import GroupId, InstanceId, Response, Task

WEIGHTS = Weights(3, "w")
PAYLOADS = st.lists(st.binary(max_size=20), max_size=5)


@given(PAYLOADS, st.integers(0, 200))
def test_of_a_file_cut_anywhere_every_whole_frame_is_read(
    payloads: list[bytes], cut: int
) -> None:
    frames = [frame_of(payload) for payload in payloads]
    data = b"".join(frames)[:cut]
    ends = list(accumulate(map(len, frames)))
    num_whole = sum(end <= len(data) for end in ends)
    found = list(frames_in(data))
    assert [frame.payload for frame in found] == payloads[:num_whole]
    assert not is_followed(data, found[-1].end if found else 0)


@given(PAYLOADS.filter(bool), st.data())
def test_a_flipped_bit_costs_the_frame_it_is_in_and_none_before_it(
    payloads: list[bytes], draws: st.DataObject
) -> None:
    frames = [frame_of(payload) for payload in payloads]
    data = bytearray(b"".join(frames))
    bit = draws.draw(st.integers(0, 8 * len(data) - 1))
    data[bit // 8] ^= 1 << bit % 8
    ends = list(accumulate(map(len, frames)))
    struck = next(i for i, end in enumerate(ends) if bit // 8 < end)
    found = list(frames_in(bytes(data)))
    assert [frame.payload for frame in found] == payloads[:struck]
    at = found[-1].end if found else 0
    assert is_followed(bytes(data), at) == (struck < len(frames) - 1)


class JournaledController(Controller):
    """Writes every event down, as a session does, into bytes."""

    def __init__(self, ledger: Ledger, file: bytearray, **settings: Any) -> None:
        super().__init__(**settings)
        self.ledger = ledger
        self.file = file
        #: Where in the file responses are known to be finished.
        self.finished_at: dict[str, int] = {}

    def write(self, records: list[Record]) -> None:
        if records:
            self.file += encode(records)

    def note(self, commands: list[Command], **event: Any) -> list[Command]:
        self.write(self.ledger.records_of(commands, **event))
        for command in commands:
            response = getattr(command, "response", None)
            if response is not None and not response.replayed:
                self.finished_at[response.request_id] = len(self.file)
        return commands

    def add_groups(self, tasks: Iterable[Task], now: float, past: Any = None) -> Any:
        assert past is None
        tasks, past, records = self.ledger.add_groups(tasks)
        self.write(records)
        return self.note(super().add_groups(tasks, now, past))

    def progress(self, report: Any, now: float) -> Any:
        report = columns_of(report)
        return self.note(super().progress(report, now), report=report)

    def instance_up(self, info: Any, now: float) -> Any:
        return self.note(super().instance_up(info, now))

    def instance_down(
        self,
        instance_id: InstanceId,
        now: float,
        why: str,
        partners: Collection[InstanceId] = (),
    ) -> Any:
        lost = [c for i in (instance_id, *partners) for c in self.running.chunks_on(i)]
        down = super().instance_down(instance_id, now, why, partners)
        return self.note(down, lost=lost)

    def instance_left(self, instance_id: InstanceId, now: float, why: str) -> Any:
        lost = self.running.chunks_on(instance_id)
        return self.note(super().instance_left(instance_id, now, why), lost=lost)

    def cancel_group(self, group_id: GroupId, now: float) -> Any:
        return self.note(super().cancel_group(group_id, now))


class TrainerDies(ControllerMachine):
    """As its base; and the trainer dies, of whose journal some last bytes are lost."""

    @initialize()
    def begin_journal(self) -> None:
        self.keys = KeyMaker()

    def new_controller(self, **settings: Any) -> Controller:
        self.settings = settings
        self.file = bytearray()
        self.num_deaths = 0
        return self.resumed(History())

    def resumed(self, history: History) -> JournaledController:
        ledger = Ledger(history, WEIGHTS, nonce=b"n", repeats=False)
        controller = JournaledController(ledger, self.file, **self.settings)
        controller.write(ledger.begin({}, None))
        return controller

    def groups_come(self, **drawn: Any) -> None:
        raise NotImplementedError

    @rule(
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        num_prompt_tokens=st.integers(1, 12),
        max_tokens=st.integers(1, 30),
        undivided=st.booleans(),
    )
    def keyed_groups_come(
        self, sizes: list[int], num_prompt_tokens: int, max_tokens: int, undivided: bool
    ) -> None:
        tasks = [
            task_of(
                f"g{len(self.tasks) + n}",
                num_requests=size,
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens,
                undivided_because="bad_words" if undivided else None,
            )
            for n, size in enumerate(sizes)
        ]
        self.add(tasks)

    def add(self, tasks: list[Task]) -> None:
        make = self.keys.key_of
        tasks = [replace(t, key=make(t, has_own_id=True)) for t in tasks]
        self.tasks.update((task.group_id, task) for task in tasks)
        self.do(self.controller.add_groups(tasks, self.tick()))

    @rule(lost=st.one_of(st.just(0), st.integers(0, 400)), order=st.randoms())
    def trainer_dies(self, lost: int, order: Any) -> None:
        before = self.controller
        assert isinstance(before, JournaledController)
        cut = max(0, len(self.file) - lost)
        reading = read(bytes(self.file[:cut]))
        assert not reading.damage
        del self.file[reading.end :]
        kept = {
            name: self.responses[name]
            for name, at in before.finished_at.items()
            if at <= reading.end and self.is_final(self.responses[name])
        }
        self.num_deaths += 1
        self.alive.clear()
        self.running.clear()
        self.found_at.clear()
        self.old.clear()
        self.cancelled.clear()
        self.responses.clear()
        self.controller = self.resumed(reading.history)
        self.controller.finished_at |= {n: before.finished_at[n] for n in kept}
        tasks = list(self.tasks.values())
        order.shuffle(tasks)
        self.do(self.controller.add_groups(tasks, self.tick()))
        replayed = {n: r for n, r in self.responses.items() if r.replayed}
        assert replayed.keys() == kept.keys() == self.responses.keys()
        for name, response in kept.items():
            again = self.responses[name]
            for what in ("token_ids", "logprobs", "text", "finish_reason"):
                assert getattr(again, what) == getattr(response, what)

    @staticmethod
    def is_final(response: Response) -> bool:
        return response.finish_reason in ("stop", "length")

    def check_counts_of_chunks(self) -> None:
        if not self.num_deaths:
            super().check_counts_of_chunks()


TrainerDies.TestCase.settings = settings(stateful_step_count=40)
TestTrainerDies = TrainerDies.TestCase


def test_a_journal_cut_at_every_byte_is_its_longest_whole_beginning() -> None:
    """And what it tells is what the buffer had when that event was over."""
    file = bytearray()
    ledger = Ledger(History(), WEIGHTS, nonce=b"n", repeats=False)
    controller = JournaledController(
        ledger, file, policy="context-aware", chunk_size=8, max_request_retries=2
    )
    states: dict[int, dict[str, tuple[int, str | None]]] = {0: {}}
    finished: dict[str, tuple[int, str | None]] = {}
    controller.write(ledger.begin({}, None))

    def note(commands: list[Command]) -> list[Command]:
        for r in finished_in(commands):
            finished[r.request_id] = (len(r.token_ids), r.finish_reason)
        states[len(file)] = finished | {
            r.request_id: (r.num_generated, None)
            for r in controller.buffer.requests()
            if not r.state.is_finished and r.num_generated
        }
        return commands

    note([])
    task = task_of("g", num_requests=3, max_tokens=20)
    key = KeyMaker().key_of(task, has_own_id=True)
    note(controller.add_groups([replace(task, key=key)], 0.0))
    chunks = chunks_in(note(controller.instance_up(info_of(0), 1.0)))
    first, second = chunks[0].chunk_id, chunks[1].chunk_id
    note(controller.progress([report_of(first, [1, 2], text="ab")], 2.0))
    third = [report_of(first, [3], start=2, end="stop"), report_of(second, [7])]
    note(controller.progress(third, 3.0))
    note(controller.instance_down(info_of(0).instance_id, 4.0, "it died"))
    note(controller.progress([report_of(second, [8, 9], start=1)], 5.0))  # too late
    assert finished == {"g/0": (3, "stop")}
    ends = sorted(states)
    for cut in range(len(file) + 1):
        reading = read(bytes(file[:cut]))
        assert not reading.damage
        assert reading.end == max(end for end in ends if end <= cut)
        past = reading.history.pop(key, WEIGHTS)
        found = {f"g/{i}": (p.num_tokens, p.finish_reason) for i, p in past.items()}
        assert found == states[reading.end]


@given(st.binary(max_size=60), st.data())
def test_any_change_of_a_journal_is_read_without_an_error(
    noise: bytes, draws: st.DataObject
) -> None:
    ledger = Ledger(History(), WEIGHTS, nonce=b"n", repeats=False)
    data = bytearray(encode(ledger.begin({"a": "b"}, None)))
    data += frame_of(noise)
    data += encode(ledger.begin({"a": "b"}, None))
    at = draws.draw(st.integers(0, len(data)))
    data[at : at + len(noise)] = noise
    reading = read(bytes(data))
    assert 0 <= reading.end <= len(data)


def lengths_after(*, undivided: bool, num_steps: int, seed: int) -> list[int]:
    """Lengths of 600 responses of which each token ends one with a chance of 0.1.

    Args:
        num_steps: after so many tokens each the trainer dies; 0 = it does not.
    """
    file, chance = bytearray(), random.Random(seed)
    task = task_of(
        "g",
        num_requests=600,
        max_tokens=10_000,
        undivided_because="bad_words" if undivided else None,
    )
    task = replace(task, key=KeyMaker().key_of(task, has_own_id=True))
    lengths: dict[str, int] = {}
    lives = [num_steps, 10_000] if num_steps else [10_000]
    for num_left in lives:
        history = read(bytes(file)).history
        ledger = Ledger(history, WEIGHTS, nonce=b"n", repeats=False)
        controller = JournaledController(
            ledger, file, policy="fcfs", chunk_size=16, max_request_retries=2
        )
        controller.write(ledger.begin({}, None))
        info = info_of(0, num_kv_blocks=10**8, max_num_seqs=10**6)
        commands = controller.add_groups([task], 0.0)
        commands += controller.instance_up(info, 0.0)
        running: dict[int, tuple[random.Random, int, int]] = {}
        for step in range(num_left):
            for chunk in chunks_in(commands):
                numbers = chance if chunk.seed is None else random.Random(chunk.seed)
                running[chunk.chunk_id] = (numbers, 0, chunk.max_tokens)
            for response in finished_in(commands):
                lengths[response.request_id] = len(response.token_ids)
            if not running:
                break
            reports = []
            for chunk_id, (numbers, made, most) in list(running.items()):
                stops = numbers.random() < 0.1
                end = "stop" if stops else "length" if made + 1 == most else None
                reports.append(report_of(chunk_id, [1], start=made, end=end))
                running[chunk_id] = (numbers, made + 1, most)
                if end:
                    del running[chunk_id]
            commands = controller.progress(reports, float(step))
    assert len(lengths) == 600
    return list(lengths.values())


@pytest.mark.parametrize("undivided", [False, True])
def test_a_death_of_the_trainer_makes_responses_no_shorter(undivided: bool) -> None:
    """Those that are finished are kept, so what is not must not begin again by chance:
    the mean length of 10, with a standard error of 0.4, would become 6.6.
    """
    for num_steps in (0, 7):
        lengths = lengths_after(
            undivided=undivided, num_steps=num_steps, seed=num_steps
        )
        assert abs(sum(lengths) / len(lengths) - 10) < 4 * 0.4


def test_undivided_requests_are_sampled_again_as_they_were() -> None:
    whole = lengths_after(undivided=True, num_steps=0, seed=1)
    broken = lengths_after(undivided=True, num_steps=7, seed=2)
    assert sorted(whole) == sorted(broken)
