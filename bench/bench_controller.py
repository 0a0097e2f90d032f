"""How many instances can one controller serve, and how long does it block a trainer?

A whole controller (session, decisions, buffer, recorder, draft server, sockets) runs in
this process, as an engine runs it; beside it, in another process, are simulated engines
that say what real ones say (`crowd.py`). Each of 1,000 runs 200 chunks and reports 5
times a second: 20 tokens of every chunk with their logprobs and text. Three kinds of
rounds take turns:

- `reports`: nothing else happens;
- `ends`: with each report one chunk ends, and another starts, so that chunks have 4,000
  tokens; every tenth end finishes its request;
- `drafts`: as well as that, each engine asks after each report for what siblings wrote.
  That is the dearest case: the siblings of nearly every chunk run on other engines, so
  that each token is given out seven times.

The engines report as fast as they are heard, so that a second of theirs may take longer
than one. What it costs is the CPU time of all threads of this process, which other
programs on the machine lengthen less than the wall time. `cores_at_1000_instances` is
that by second, for reports and ends; `cores_with_drafts` is it for all, and
`us_per_report` has the threads: the engine's, the draft server's, ZeroMQ's and the one
that reads responses (`process` is all of them). `reports_per_s` and `chunk_ends_per_s`
are how many of one kind alone fill a core.

`loop_block_ms` is how long this program's main thread, which asks for nothing but to
run a line of Python every half millisecond, was kept from that by the engine's threads:
how late it was, but at most what they computed meanwhile. Rounds with drafts count.

`collection_ms` is how long one full garbage collection of Python takes then: it stops
every thread, and comes now and then.

`us_per_1000_response_tokens` is the time to make a response's lists of numbers. It is
not part of the above, where responses are shorter than those of a rollout in which
as many tokens are finished as are generated: there it is paid for every token.

Expected: at most one core, and no block of 5 ms.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import print_result, quantiles, result_line
from crowd import allow_many_files
from crowded import REPORTS_PER_S, Serving, Size

from aseer.core.outputs import Outputs
from aseer.types import Past

if TYPE_CHECKING:
    from crowd import Done

KINDS = ("reports", "ends", "drafts")
PROBE_S = 0.0005


class Probe:
    """Notes how long the calling thread is kept from running by others."""

    def __init__(self, serving: Serving) -> None:
        idents = [
            thread.ident
            for thread in threading.enumerate()
            if thread.name.startswith("aseer")
        ]
        self._clocks = [time.pthread_getcpuclockid(i) for i in idents if i is not None]
        self.blocks_ms: list[float] = []

    def watch(self, is_over: threading.Event) -> None:
        """Until that is so."""
        while not is_over.is_set():
            computed, since = self._computed(), time.perf_counter()
            time.sleep(PROBE_S)
            late = time.perf_counter() - since - PROBE_S
            computed = self._computed() - computed
            self.blocks_ms.append(1e3 * max(0.0, min(late, computed)))

    def _computed(self) -> float:
        return sum(map(time.clock_gettime, self._clocks))


def measure_phase(serving: Serving, probe: Probe, rounds: int, kind: str) -> Phase:
    """Go so many rounds of a kind, in which this thread is the trainer's."""
    before = serving.cpu_s()
    is_over = threading.Event()
    dones: list[Done] = []

    def wait() -> None:
        dones.append(serving.crowd.done())
        is_over.set()

    serving.crowd.go(rounds, kind)
    waiting = threading.Thread(target=wait)
    waiting.start()
    probe.watch(is_over)
    waiting.join()
    after = serving.cpu_s()
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    probing = spent.pop("MainThread")
    spent["process"] -= probing
    return Phase(dones[0], spent)


@dataclass(frozen=True)
class Phase:
    """What was done, and the seconds of CPU time that threads spent on it."""

    done: Done
    spent_s: dict[str, float]

    def us_per_report(self, thread: str) -> float:
        return 1e6 * self.spent_s[thread] / self.done.num_reports


def run(size: Size) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        with Serving(size, Path(folder)) as serving:
            serving.wait_until_full()
            probe = Probe(serving)
            measure_phase(serving, probe, size.warmup, "drafts")
            probe.blocks_ms.clear()
            phases: dict[str, list[Phase]] = {kind: [] for kind in KINDS}
            for i in range(size.phases):
                for kind in KINDS[:: 1 if i % 2 else -1]:
                    phase = measure_phase(serving, probe, size.rounds, kind)
                    phases[kind].append(phase)
            return figures_of(size, phases, probe) | {
                "collection_ms": collection_ms(),
                "num_responses": serving.num_read,
                "us_per_1000_response_tokens": us_per_1000_response_tokens(),
            }


def figures_of(
    size: Size, phases: dict[str, list[Phase]], probe: Probe
) -> dict[str, Any]:
    """The figures of all phases."""
    cost = {
        kind: {
            thread: quantiles([p.us_per_report(thread) for p in of_kind], 1)
            for thread in ("process", "aseer-engine", "aseer-dgds", "reader")
        }
        for kind, of_kind in phases.items()
    }
    us = {kind: cost[kind]["process"]["median"] for kind in KINDS}
    ends_per_report = _mean(phases["ends"], "num_ends", "num_reports")
    us_per_end = (us["ends"] - us["reports"]) / ends_per_report
    blocks = np.array(probe.blocks_ms)
    return {
        "cores_at_1000_instances": _cores(us["ends"]),
        "cores_with_drafts": _cores(us["drafts"]),
        "cores_of_reports": _cores(us["reports"]),
        "reports_per_s": round(1e6 / us["reports"]),
        "chunk_ends_per_s": round(1e6 / us_per_end) if us_per_end > 0 else None,
        "loop_block_ms_p99": round(float(np.quantile(blocks, 0.99)), 2),
        "loop_block_ms_max": round(float(blocks.max()), 2),
        "num_probes": len(blocks),
        "us_per_report": cost,
        "us_per_chunk_end": round(us_per_end, 1),
        "bytes_per_report": round(
            _mean(phases["reports"], "report_bytes", "num_reports")
        ),
        "asked_per_fetch": round(_mean(phases["drafts"], "num_asked", "num_fetches")),
        "given_per_fetch": round(_mean(phases["drafts"], "num_given", "num_fetches")),
        "num_instances": size.instances,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _cores(us_per_report: float) -> float:
    return round(us_per_report * REPORTS_PER_S * 1_000 / 1e6, 3)


def _mean(phases: list[Phase], what: str, per: str) -> float:
    done = [phase.done for phase in phases]
    return float(
        sum(getattr(d, what) for d in done) / max(1, sum(getattr(d, per) for d in done))
    )


def collection_ms() -> float:
    """The least time in which a full garbage collection stops all threads."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        gc.collect()
        times.append(time.perf_counter() - begun)
    return round(1e3 * min(times), 1)


def us_per_1000_response_tokens() -> float:
    """CPU time to make a response's lists, of 20,000 tokens."""
    num = 20_000
    outputs = Outputs()
    handle = outputs.open()
    values = bytes(4 * num)
    outputs.restore(handle, Past(tokens=values, logprobs=values, text=b""))
    times = []
    for _ in range(20):
        begun = time.thread_time()
        outputs.token_ids(handle)
        outputs.logprobs_of_tokens(handle)
        times.append(time.thread_time() - begun)
    return round(1e9 * sorted(times)[len(times) // 2] / num, 1)


def main() -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--instances", type=int, default=1_000)
    parser.add_argument("--phases", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a small run, in seconds")
    parser.add_argument("--save", metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    size = Size(instances=args.instances, phases=args.phases)
    if args.smoke:
        size = replace(size, instances=10, chunks=50, warmup=1, rounds=2, phases=1)
    allow_many_files()
    line = result_line("controller", settings=asdict(size), figures=run(size))
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
