"""A weight update from its caller's side: begin, send, switch.

The sender runs in the thread that asked for the update, since a sharded trainer's
iterator may have collectives in it that belong to that thread, or in another process
altogether (`aseer.weights.target`); the rest happens on the engine's thread.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aseer.errors import ConfigError, WeightUpdateError, describe
from aseer.inputs.calls import check_pause, check_transfer
from aseer.inputs.fields import seconds
from aseer.report import WeightUpdateReport
from aseer.runtime.direct_update import EnginesThere
from aseer.runtime.steps import Either
from aseer.weights.direct import (
    chosen_way,
    offer_engines,
    send_directly,
)
from aseer.weights.held import check_kind
from aseer.weights.sending import send, send_async
from aseer.weights.target import WeightTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from concurrent.futures import Future

    from aseer.inputs.calls import Transfer
    from aseer.runtime.direct_update import DirectUpdate
    from aseer.runtime.host import Host
    from aseer.runtime.loop_thread import LoopThread
    from aseer.runtime.steps import Step
    from aseer.runtime.weights import Pause, Plan, SwitchTimes
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
    transfer: Transfer,
    *,
    verify: bool = False,
) -> Generator[Step, Any, WeightUpdateReport]:
    """The steps of `Engine.update_weights`; see `aseer.runtime.steps`.

    However the caller's wait ends, the engine is given back: an update that was only
    begun is given up, and one that switches goes on to its end, since half an update
    cannot be left.
    """
    check_pause(pause)
    check_transfer(transfer)
    way = chosen_way(transfer, source, host.updates.transfer_backend)
    if way != "host":
        check_kind(source, way)
    plan = yield from _begun(
        thread,
        thread.submit(partial(host.updates.begin, version, pause, asker, way)),
        host.weights.abandon,
    )
    if way != "host":
        return (yield from _direct_steps(thread, host, plan, source, way, verify))
    try:
        started = time.monotonic()
        index: Index = yield Either(
            lambda: send(source, plan.model, plan.directory, plan.mappings),
            lambda: send_async(source, plan.model, plan.directory, plan.mappings),
        )
        send_s = time.monotonic() - started
    except BaseException as error:
        thread.post(lambda: host.weights.abandon(plan))
        if isinstance(error, OSError | WeightUpdateError) and thread.ended.is_set():
            raise thread.closed_error() from error  # where it wrote to is gone
        raise
    times: SwitchTimes = yield thread.submit(lambda: host.updates.switch(plan, index))
    return _report(plan.version, index, send_s, times)


def _direct_steps(
    thread: LoopThread,
    host: Host,
    plan: Plan,
    source: WeightSource,
    way: str,
    verify: bool,
) -> Generator[Step, Any, WeightUpdateReport]:
    """Send straight to the engines, in the caller's thread also for asyncio code.

    Whatever ends it, engines that had begun to change are started again.
    """
    try:
        update: DirectUpdate = yield thread.submit(partial(_direct_update, host, way))
    except BaseException:
        thread.post(lambda: host.weights.abandon(plan))
        raise
    engines = EnginesThere(thread, update)
    started = time.monotonic()

    def send_now() -> None:
        send_directly(source, plan.model, way, engines)

    async def send_soon() -> None:
        send_now()

    try:
        yield Either(send_now, send_soon)
    except BaseException as error:
        why = describe(error)
        if not isinstance(error, WeightUpdateError):  # it is the source's, or Ctrl-C
            thread.post(partial(host.updates.fail_direct, plan, update, why))
            raise
        if thread.ended.is_set():
            raise thread.closed_error() from error
        told = yield thread.submit(partial(_failing, host, plan, update, why))
        raise WeightUpdateError(f"{error}; {told}") from error
    whole_s = time.monotonic() - started
    settle = partial(host.updates.settle_direct, plan, update, verify=verify)
    yield thread.submit(settle)
    return _direct_report(plan.version, update, whole_s)


async def _direct_update(host: Host, way: str) -> DirectUpdate:
    return host.updates.direct(way)


async def _failing(host: Host, plan: Plan, update: DirectUpdate, why: str) -> str:
    return host.updates.fail_direct(plan, update, why)


def _direct_report(
    version: int, update: DirectUpdate, whole_s: float
) -> WeightUpdateReport:
    return WeightUpdateReport(
        version=version,
        num_tensors=update.num_tensors,
        num_bytes=update.num_bytes,
        send_s=max(0.0, whole_s - update.prepare_s - update.switch_s),
        prepare_s=update.prepare_s,
        switch_s=update.switch_s,
    )


def begin_steps(
    thread: LoopThread,
    host: Host,
    version: int | None,
    pause: Pause | None,
    timeout_s: float,
    asker: object,
    transfer: Transfer,
) -> Generator[Step, Any, WeightTarget]:
    """The steps of `Engine.begin_update`."""
    check_pause(pause)
    check_transfer(transfer)
    # What will be sent is not known yet, nor which processes take part.
    way = "host" if transfer == "auto" else transfer
    timeout_s = seconds("timeout_s", timeout_s)
    begin = partial(host.updates.begin_open, version, pause, timeout_s, asker, way)
    target: WeightTarget = yield from _begun(
        thread, thread.submit(begin), host.updates.abandon_open
    )
    update = host.updates.open_direct
    if update is not None:
        offer_engines(target.directory, EnginesThere(thread, update))
    return target


def finish_steps(
    thread: LoopThread, host: Host, target: WeightTarget
) -> Generator[Step, Any, WeightUpdateReport]:
    """The steps of `Engine.finish_update`; a switch goes on if nobody waits for it."""
    check_target(target)
    if target.transfer != "host":
        finish = partial(host.updates.finish_direct, target)
        return _direct_report(target.version, (yield thread.submit(finish)), 0.0)
    sent, times = yield thread.submit(lambda: host.updates.finish_open(target))
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
