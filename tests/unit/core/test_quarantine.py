"""Suspects are tried one at a time, and blamed alone."""

from __future__ import annotations

from collections import Counter

import pytest

from aseer.controller import Controller
from aseer.core.commands import Dispatch, Finished
from aseer.types import ChunkEnd, ChunkProgress, GroupId, InstanceId, InstanceInfo, Task

NUM_INSTANCES = 2


def info(i: int) -> InstanceInfo:
    return InstanceInfo(
        instance_id=InstanceId(i),
        num_kv_blocks=1000,
        block_size=16,
        max_num_seqs=16,
        max_model_len=1000,
    )


def task(name: str, n: int) -> Task:
    return Task(
        group_id=GroupId(name),
        num_requests=n,
        prompt=bytes(16),
        num_prompt_tokens=4,
        max_tokens=40,
    )


class Engines:
    """Engines of which some die as soon as they are given a fatal request."""

    def __init__(self, fatal: set[str], num_instances: int = NUM_INSTANCES) -> None:
        self.fatal = fatal
        self.controller = Controller(policy="context-aware", chunk_size=16)
        self.running: dict[int, list] = {i: [] for i in range(num_instances)}
        self.finished: dict[str, str] = {}
        self.deaths: list[int] = []
        self.num_steps = 0
        self.do(
            [c for i in self.running for c in self.controller.instance_up(info(i), 0)]
        )

    def do(self, commands) -> None:
        for command in commands:
            if isinstance(command, Dispatch):
                self.running[command.chunk.instance_id].append(command.chunk)
            elif isinstance(command, Finished):
                response = command.response
                assert response.request_id not in self.finished
                self.finished[response.request_id] = response.finish_reason
        self.controller.check_integrity()

    def step(self) -> None:
        """Every engine runs its chunks to their ends, or dies."""
        self.num_steps += 1
        for i, chunks in self.running.items():
            self.running[i] = []
            if any(c.group_id in self.fatal for c in chunks):
                self.deaths.append(i)
                self.do(self.controller.instance_down(InstanceId(i), 0.0, "it died"))
                self.do(self.controller.instance_up(info(i), 0.0))
            elif chunks:
                reports = [
                    ChunkProgress(
                        chunk_id=c.chunk_id,
                        start=0,
                        tokens=bytes(4 * c.max_tokens),
                        logprobs=bytes(4 * c.max_tokens),
                        num_cached_tokens=0,
                        end=ChunkEnd(reason="length"),
                    )
                    for c in chunks
                ]
                self.do(self.controller.progress(reports, 0.0))

    def run(self, tasks: list[Task]) -> None:
        self.do(self.controller.add_groups(tasks, 0.0))
        for _ in range(500):
            if not self.controller.num_unfinished:
                return
            self.step()
        pytest.fail("requests were never tried again")


@pytest.mark.parametrize("num_instances", [1, 2, 4])
def test_one_fatal_request_takes_none_of_its_neighbours_with_it(num_instances):
    engines = Engines({"fatal"}, num_instances)
    engines.run([task(f"g{i}", 4) for i in range(3)] + [task("fatal", 1)])
    assert Counter(engines.finished.values()) == {"length": 12, "error": 1}
    assert engines.finished["fatal/0"] == "error"
    assert len(engines.deaths) == 4


def test_a_whole_group_of_fatal_requests_ends_alone():
    engines = Engines({"fatal"})
    engines.run([task("good", 8), task("fatal", 3), task("fine", 8)])
    assert Counter(engines.finished.values()) == {"length": 16, "error": 3}


def test_requests_lost_to_deaths_of_other_causes_are_not_held_for_long():
    engines = Engines(set())
    engines.do(engines.controller.add_groups([task(f"g{i}", 4) for i in range(4)], 0.0))
    for i in engines.running:
        engines.running[i] = []
        engines.do(engines.controller.instance_down(InstanceId(i), 0.0, "power"))
    for i in engines.running:
        engines.do(engines.controller.instance_up(info(i), 0.0))
    engines.run([])
    # Two requests a trial, then four, and so on: few steps, not one a request.
    assert engines.num_steps <= 2 * 5 + 3 * 2
    assert Counter(engines.finished.values()) == {"length": 16}


def test_a_held_request_can_be_cancelled():
    engines = Engines({"fatal"}, 1)
    engines.do(engines.controller.add_groups([task("a", 4), task("fatal", 1)], 0.0))
    engines.step()
    engines.step()
    engines.do(engines.controller.cancel_all(0.0, max_requests=1))
    while not engines.controller.is_cancelled:
        engines.do(engines.controller.cancel_all(0.0, max_requests=1))
    aborted = [r for r in engines.finished.values() if r == "aborted"]
    running = sum(len(chunks) for chunks in engines.running.values())
    assert len(aborted) + running == 5
