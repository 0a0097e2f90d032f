"""A weight update from its caller's side: begin, send, switch.

The sender runs in the thread that asked for the update, since a sharded trainer's
iterator may have collectives in it that belong to that thread; the rest happens on the
engine's thread.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from aseer.config import check_pause
from aseer.errors import WeightUpdateError
from aseer.report import WeightUpdateReport
from aseer.runtime.steps import Either
from aseer.weights.sending import send, send_async

if TYPE_CHECKING:
    from collections.abc import Generator
    from concurrent.futures import Future

    from aseer.runtime.host import Host
    from aseer.runtime.loop_thread import LoopThread
    from aseer.runtime.steps import Step
    from aseer.runtime.weights import Pause, Plan, SwitchTimes
    from aseer.weights.files import Index
    from aseer.weights.sending import WeightSource


def update_steps(
    thread: LoopThread,
    host: Host,
    source: WeightSource,
    version: int | None,
    pause: Pause | None,
    asker: object,
) -> Generator[Step, Any, WeightUpdateReport]:
    """The steps of `Engine.update_weights`; see `aseer.runtime.steps`.

    However the caller's wait ends, the engine is given back: an update that was only
    begun is given up, and one that switches goes on to its end, since half an update
    cannot be left.
    """
    check_pause(pause)
    beginning = thread.submit(partial(host.begin_weight_update, version, pause, asker))
    try:
        plan: Plan = yield beginning
    except BaseException:
        beginning.add_done_callback(partial(_abandon, thread, host))
        thread.cancel(beginning)
        raise
    try:
        started = time.monotonic()
        index: Index = yield Either(
            lambda: send(source, plan.model, plan.directory),
            lambda: send_async(source, plan.model, plan.directory),
        )
        send_s = time.monotonic() - started
    except BaseException as error:
        thread.post(lambda: host.weights.abandon(plan))
        if isinstance(error, OSError | WeightUpdateError) and thread.ended.is_set():
            raise thread.closed_error() from error  # where it wrote to is gone
        raise
    times: SwitchTimes = yield thread.submit(lambda: host.switch_weights(plan))
    return WeightUpdateReport(
        version=plan.version,
        num_tensors=len(index.tensors),
        num_bytes=index.num_bytes,
        send_s=send_s,
        prepare_s=times.prepare_s,
        switch_s=times.switch_s,
    )


def _abandon(thread: LoopThread, host: Host, beginning: Future[Plan]) -> None:
    """Give an update up whose caller was interrupted while it began."""
    if beginning.exception() is None:
        plan = beginning.result()
        thread.post(lambda: host.weights.abandon(plan))
