"""A whole controller's work while nothing ends: what engines report, a few times a
second, and what the recorder makes of it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from aseer.controller import Controller
from aseer.core.columns import columns_of
from aseer.core.commands import Dispatch
from aseer.instance.messages import FROM_INSTANCE, Report
from aseer.runtime.recorder import Recorder
from aseer.types import ChunkProgress, GroupId, InstanceLoad, Task

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.types import Chunk, InstanceId, InstanceInfo

TOKENS_PER_REPORT = 8  # of each request: 32 a second
REPORTS_PER_S = 4  # of each instance


class Reporting:
    """Instances full of requests, all of which report in turn."""

    def __init__(self, instances: Iterable[InstanceInfo], max_tokens: int) -> None:
        """Fill every instance with as many requests as it runs."""
        self._controller = Controller(policy="context-aware", chunk_size=max_tokens)
        self._recorder = Recorder(self._controller, "context-aware", max_tokens, 0)
        self._chunks: dict[InstanceId, list[Chunk]] = {}
        self._num_rounds = 0
        self._encoder = msgspec.msgpack.Encoder()
        num_places = 0
        for info in instances:
            self._recorder.instance_up(info, InstanceLoad())
            self._controller.instance_up(info, 0.0)
            self._chunks[info.instance_id] = []
            num_places += info.max_num_seqs
        tasks = (
            Task(
                group_id=GroupId(f"g{g}"),
                num_requests=8,
                prompt=bytes(4),
                num_prompt_tokens=1,
                max_tokens=max_tokens,
            )
            for g in range(num_places // 8)
        )
        for command in self._controller.add_groups(tasks, 0.0):
            assert isinstance(command, Dispatch)
            self._chunks[command.chunk.instance_id].append(command.chunk)

    @property
    def num_running(self) -> int:
        """Requests that run."""
        return sum(map(len, self._chunks.values()))

    def round(self) -> float:
        """Every instance reports once; CPU time to take a report, in microseconds."""
        start = self._num_rounds * TOKENS_PER_REPORT
        values = bytes(4 * TOKENS_PER_REPORT)
        per_report_s = 1 / (REPORTS_PER_S * len(self._chunks))
        now = self._num_rounds / REPORTS_PER_S
        spent_s = 0.0
        for instance_id, chunks in self._chunks.items():
            columns = columns_of(
                ChunkProgress(
                    chunk_id=chunk.chunk_id, start=start, tokens=values, logprobs=values
                )
                for chunk in chunks
            )
            load = InstanceLoad(num_running=len(chunks), kv_used=0.5)
            message = self._encoder.encode(Report(columns, load))
            now += per_report_s
            begun_s = time.thread_time()
            report = FROM_INSTANCE.decode(message)
            assert isinstance(report, Report)
            commands = self._controller.progress(report.chunks, now)
            self._recorder.count_tokens(instance_id)
            self._recorder.mark_busy(now)
            self._recorder.sample(instance_id, report.load, now)
            self._recorder.progress(now, intake_open=False)
            spent_s += time.thread_time() - begun_s
            assert not commands, "nothing ends"
        self._num_rounds += 1
        return 1e6 * spent_s / len(self._chunks)
