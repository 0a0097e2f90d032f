"""A weight update from its caller's side: begin, send, switch.

The sender runs in the thread that asked for the update, since a sharded trainer's
iterator may have collectives in it that belong to that thread, or in another process
altogether (`aseer.weights.target`); the rest happens on the engine's thread.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aseer.config import check_pause
from aseer.errors import ConfigError, WeightUpdateError
from aseer.report import WeightUpdateReport
from aseer.runtime.steps import Either
from aseer.weights.sending import send, send_async
from aseer.weights.target import WeightTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from concurrent.futures import Future

    from aseer.runtime.host import Host
    from aseer.runtime.loop_thread import LoopThread
    from aseer.runtime.steps import Step
    from aseer.runtime.weights import Pause, SwitchTimes
    from aseer.weights.files import Index
    from aseer.weights.sending import WeightSource

T = TypeVar("T")


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
    plan = yield from _begun(
        thread,
        thread.submit(partial(host.begin_weight_update, version, pause, asker)),
        host.weights.abandon,
    )
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
    times: SwitchTimes = yield thread.submit(lambda: host.switch_weights(plan, index))
    return _report(plan.version, index, send_s, times)


def begin_steps(
    thread: LoopThread,
    host: Host,
    version: int | None,
    pause: Pause | None,
    timeout_s: float,
    asker: object,
) -> Generator[Step, Any, WeightTarget]:
    """The steps of `Engine.begin_update`."""
    check_pause(pause)
    if isinstance(timeout_s, bool) or not 0 < timeout_s < float("inf"):
        raise ConfigError(
            f"timeout_s={timeout_s!r} is not allowed; give seconds greater than 0"
        )
    begin = partial(host.open_weight_update, version, pause, timeout_s, asker)
    return (yield from _begun(thread, thread.submit(begin), host.abandon_open_update))


def finish_steps(
    thread: LoopThread, host: Host, target: WeightTarget
) -> Generator[Step, Any, WeightUpdateReport]:
    """The steps of `Engine.finish_update`; a switch goes on if nobody waits for it."""
    check_target(target)
    sent, times = yield thread.submit(lambda: host.finish_open_update(target))
    return _report(target.version, sent.index, sent.send_s, times)


def check_target(target: object) -> None:
    """Raise a ConfigError for what no `begin_update` made."""
    if not isinstance(target, WeightTarget):
        raise ConfigError(
            "a weight update is ended with the WeightTarget that Engine.begin_update "
            f"made, not with a {type(target).__name__}"
        )


def _report(
    version: int, index: Index, send_s: float, times: SwitchTimes
) -> WeightUpdateReport:
    return WeightUpdateReport(
        version=version,
        num_tensors=len(index.tensors),
        num_bytes=index.num_bytes,
        send_s=send_s,
        prepare_s=times.prepare_s,
        switch_s=times.switch_s,
    )


def _begun(
    thread: LoopThread, beginning: Future[T], abandon: Callable[[T], object]
) -> Generator[Step, Any, T]:
    """What was begun; given up if its caller was interrupted while it began."""
    try:
        begun: T = yield beginning
    except BaseException:
        beginning.add_done_callback(partial(_give_up, thread, abandon))
        thread.cancel(beginning)
        raise
    return begun


def _give_up(
    thread: LoopThread, abandon: Callable[[T], object], beginning: Future[T]
) -> None:
    if beginning.exception() is None:
        begun = beginning.result()
        thread.post(lambda: abandon(begun))
