"""What does a journal cost the engine's loop, the disk, and a restart?

One instance runs 256 requests and reports all of them, 8 tokens and some text each. A
controller takes the reports; beside it, each becomes an event of a journal. What that
adds on the engine's loop is measured by a thread's CPU time, which other programs
lengthen less than the wall time: for a report (`us_per_report`; the controller's own
work on it is `controller_us_per_report`) and for a request's end (`us_per_end`). The
disk's own thread is not measured: nobody waits for it but responses.

The same journal is then read as a restart reads it (`read_mb_per_s`), and its finished
requests come back as responses (`us_per_replayed`).

Expected: less for the journal than for the controller, since a report is written as it
came; some 15 bytes a token, of which token and logprob are 8 and the text is 4.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from common import print_result, quantiles, result_line

from aseer.controller import Controller
from aseer.core.columns import Columns, columns_of
from aseer.core.commands import Dispatch, Finished
from aseer.journal.history import History, Weights, read
from aseer.journal.keys import KeyMaker
from aseer.journal.ledger import Ledger
from aseer.journal.records import encode
from aseer.types import (
    ChunkEnd,
    ChunkId,
    ChunkProgress,
    GroupId,
    InstanceId,
    InstanceInfo,
    Task,
)

NUM_REQUESTS = 256
NUM_TOKENS = 8  # of a request in a report
TEXT = "abcd" * NUM_TOKENS
WEIGHTS = Weights(1, "bench")
INFO = InstanceInfo(
    instance_id=InstanceId(0),
    num_kv_blocks=1 << 24,
    block_size=16,
    max_num_seqs=NUM_REQUESTS,
    max_model_len=1 << 20,
)


def report(step: int, *, ends: bool) -> Columns:
    """What the instance says of all its chunks."""
    values = bytes(4 * NUM_TOKENS)
    return columns_of(
        ChunkProgress(
            chunk_id=ChunkId(i),
            start=step * NUM_TOKENS,
            tokens=values,
            logprobs=values,
            text_start=step * len(TEXT),
            text=TEXT,
            end=ChunkEnd(reason="stop") if ends else None,
        )
        for i in range(NUM_REQUESTS)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=int, default=1000)
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    num_reports = 50 if options.smoke else options.reports

    task = Task(
        group_id=GroupId("g"),
        num_requests=NUM_REQUESTS,
        prompt=bytes(4 * 512),
        num_prompt_tokens=512,
        max_tokens=(num_reports + 1) * NUM_TOKENS,
    )
    key = KeyMaker().key_of(task, has_own_id=True)
    task = replace(task, key=key)
    controller = Controller(policy="fcfs", chunk_size=0)
    ledger = Ledger(History(), WEIGHTS, nonce=b"", repeats=False)
    added = ledger.add_groups([task])
    file = bytearray(encode([*ledger.begin({}, None), *added.records]))
    commands = controller.add_groups([task], 0.0) + controller.instance_up(INFO, 0.0)
    assert sum(isinstance(c, Dispatch) for c in commands) == NUM_REQUESTS
    file += encode(ledger.records_of(commands))

    of_controller, of_journal, of_ends = [], [], []
    for step in range(num_reports + 1):
        is_last = step == num_reports
        columns = report(step, ends=is_last)
        begin = time.thread_time()
        commands = controller.progress(columns, float(step))
        middle = time.thread_time()
        frame = encode(ledger.records_of(commands, report=columns))
        end = time.thread_time()
        file += frame
        if is_last:
            of_ends.append((end - middle) * 1e6 / NUM_REQUESTS)
        else:
            of_controller.append((middle - begin) * 1e6)
            of_journal.append((end - middle) * 1e6)

    begin = time.thread_time()
    reading = read(bytes(file))
    read_s = time.thread_time() - begin
    assert reading.end == len(file)
    past = reading.history.pop(key, WEIGHTS)
    begin = time.thread_time()
    again = Controller(policy="fcfs", chunk_size=0)
    replayed = again.add_groups([task], 0.0, {task.group_id: past})
    replay_s = time.thread_time() - begin
    assert sum(isinstance(c, Finished) for c in replayed) == NUM_REQUESTS

    num_tokens = NUM_REQUESTS * NUM_TOKENS * (num_reports + 1)
    figures = {
        "us_per_report": quantiles(of_journal, 1),
        "controller_us_per_report": quantiles(of_controller, 1),
        "us_per_end": round(of_ends[0], 2),
        "bytes_per_token": round(len(file) / num_tokens, 2),
        "read_mb_per_s": round(len(file) / 1e6 / read_s),
        "us_per_replayed": round(replay_s * 1e6 / NUM_REQUESTS, 1),
    }
    settings = {
        "num_requests": NUM_REQUESTS,
        "tokens_per_report": NUM_TOKENS,
        "num_reports": num_reports,
    }
    line = result_line("journal", settings=settings, figures=figures)
    print_result(line, save_as=options.save)


if __name__ == "__main__":
    main()
