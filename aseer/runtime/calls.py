"""A log of a controller's calls, by which its decisions can be made again.

`LoggedController` writes every call as plain data, with a summary of the commands that
it caused. A controller is pure, so the same calls cause the same commands: `replay`
makes them again, and names the first that differs. That is a changed decision, or
something that a decision depends on and that is no argument.

    frame  =  size (4 bytes, big-endian)  +  msgpack
    log    =  frame of Settings  +  a frame of Entry for each call

A user's `metadata` is left out: no decision depends on it. Recordings of what was
generated are another thing (`trace.py`).
"""

from __future__ import annotations

import sys
import zlib
from array import array

# At run time, too: msgspec resolves the annotations.
from collections.abc import Callable, Collection, Iterable, Mapping  # noqa: TC003
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from aseer.config import PolicyName
from aseer.controller import Controller
from aseer.core.columns import Columns, columns_of
from aseer.core.commands import Abort, Blame, Command, Dispatch
from aseer.errors import ConfigError
from aseer.types import (
    ChunkProgress,
    GroupId,
    InstanceId,
    InstanceInfo,
    Past,
    Task,
)

if TYPE_CHECKING:
    from typing import BinaryIO

_T = TypeVar("_T")

FORMAT = 2
_SIZE_BYTES = 4


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller is made with; see `Controller`."""

    policy: PolicyName
    chunk_size: int
    starvation_interval: int = 0
    max_request_retries: int = 3
    weight_version: int = 0
    first_chunk_id: int = 0
    granularity: int | None = None


class _Header(msgspec.Struct):
    format: int
    settings: Settings


class _AddGroups(msgspec.Struct, tag=True):
    tasks: list[Task]
    now: float
    past: dict[GroupId, dict[int, Past]] = {}


class _InstanceUp(msgspec.Struct, tag=True):
    info: InstanceInfo
    pool: int
    now: float


class _InstanceDown(msgspec.Struct, tag=True):
    instance_id: InstanceId
    now: float
    why: str
    partners: tuple[InstanceId, ...] = ()


class _InstanceLeft(msgspec.Struct, tag=True):
    instance_id: InstanceId
    now: float
    why: str


class _Progress(msgspec.Struct, tag=True):
    report: Columns
    now: float


class _CancelGroup(msgspec.Struct, tag=True):
    group_id: GroupId
    now: float


class _CancelAll(msgspec.Struct, tag=True):
    now: float
    max_requests: int


class _FailAll(msgspec.Struct, tag=True):
    now: float
    why: str


class _Schedule(msgspec.Struct, tag=True):
    now: float


class _UsePool(msgspec.Struct, tag=True):
    granularity: int
    pools: dict[InstanceId, int]


class _SetMovePrice(msgspec.Struct, tag=True):
    price: float | None
    far: float | None = None


_Call = (
    _AddGroups
    | _InstanceUp
    | _InstanceDown
    | _InstanceLeft
    | _Progress
    | _CancelGroup
    | _CancelAll
    | _FailAll
    | _Schedule
    | _UsePool
    | _SetMovePrice
)


class _Entry(msgspec.Struct):
    """A call, and what came of it: commands' summaries, or an error's type."""

    call: _Call
    commands: list[list[Any]]
    error: str = ""


class Replayed(msgspec.Struct):
    """What making a log's calls again showed.

    Attributes:
        difference: the first call whose outcome was another; "" = none.
        is_cut: the log ends within a call: whoever wrote it died.
    """

    num_calls: int = 0
    num_commands: int = 0
    difference: str = ""
    is_cut: bool = False


class LoggedController(Controller):
    """A controller that writes down every call."""

    def __init__(self, settings: Settings, write: Callable[[bytes], object]) -> None:
        """Start with no groups and no instances, and write the settings.

        Args:
            write: takes the log's next bytes. It decides nothing and must not raise: a
                log that cannot be written is no reason to end a rollout.
        """
        super().__init__(**msgspec.structs.asdict(settings))
        self._write = write
        self._is_within = False
        write(_frame(_Header(FORMAT, settings)))

    def add_groups(
        self,
        tasks: Iterable[Task],
        now: float,
        past: Mapping[GroupId, Mapping[int, Past]] | None = None,
    ) -> list[Command]:
        tasks = list(tasks)
        plain = [replace(task, metadata=None) for task in tasks]
        had = {group_id: dict(each) for group_id, each in (past or {}).items()}
        make = super().add_groups
        return self._log(_AddGroups(plain, now, had), lambda: make(tasks, now, past))

    def instance_up(self, info: InstanceInfo, now: float) -> list[Command]:
        call = _InstanceUp(info, self.residency.pool_of(info.instance_id), now)
        make = super().instance_up
        return self._log(call, lambda: make(info, now))

    def instance_down(
        self,
        instance_id: InstanceId,
        now: float,
        why: str,
        partners: Collection[InstanceId] = (),
    ) -> list[Command]:
        call = _InstanceDown(instance_id, now, why, tuple(partners))
        make = super().instance_down
        return self._log(call, lambda: make(instance_id, now, why, partners))

    def instance_left(
        self, instance_id: InstanceId, now: float, why: str
    ) -> list[Command]:
        call = _InstanceLeft(instance_id, now, why)
        make = super().instance_left
        return self._log(call, lambda: make(instance_id, now, why))

    def progress(
        self, report: Columns | Iterable[ChunkProgress], now: float
    ) -> list[Command]:
        columns = report if isinstance(report, Columns) else columns_of(report)
        make = super().progress
        return self._log(_Progress(columns, now), lambda: make(columns, now))

    def cancel_group(self, group_id: GroupId, now: float) -> list[Command]:
        make = super().cancel_group
        return self._log(_CancelGroup(group_id, now), lambda: make(group_id, now))

    def cancel_all(self, now: float, max_requests: int = sys.maxsize) -> list[Command]:
        make = super().cancel_all
        call = _CancelAll(now, max_requests)
        return self._log(call, lambda: make(now, max_requests))

    def fail_all(self, now: float, why: str) -> list[Command]:
        make = super().fail_all
        return self._log(_FailAll(now, why), lambda: make(now, why))

    def schedule(self, now: float) -> list[Command]:
        make = super().schedule
        return self._log(_Schedule(now), lambda: make(now))

    def use_pool(self, granularity: int, pool_of: Callable[[InstanceId], int]) -> None:
        pools = {instance_id: pool_of(instance_id) for instance_id in self.running}
        super().use_pool(granularity, pool_of)
        self._log(_UsePool(granularity, pools), list)

    def set_move_price(self, price: float | None, far: float | None = None) -> None:
        super().set_move_price(price, far)
        self._log(_SetMovePrice(price, far), list)

    def _log(self, call: _Call, make: Callable[[], list[Command]]) -> list[Command]:
        """Make a call and write it; one that another makes is a part of that one."""
        if self._is_within:
            return make()
        self._is_within = True
        entry = _Entry(call, [])
        try:
            commands = make()
            entry.commands = [_summary(command) for command in commands]
        except Exception as error:
            entry.error = type(error).__name__
            raise
        finally:
            self._is_within = False
            self._write(_frame(entry))
        return commands


def replay(log: BinaryIO) -> Replayed:
    """Make a log's calls again, up to the first that does not end as it did.

    Raises:
        ConfigError: it is not a log, or one of another format.
    """
    try:
        header = _read(log, _HEADER)
    except EOFError:
        header = None
    if header is None or header.format != FORMAT:
        found = "nothing" if header is None else f"format {header.format}"
        raise ConfigError(f"a log of calls of format {FORMAT} is needed, not {found}")
    controller = Controller(**msgspec.structs.asdict(header.settings))
    pools: dict[InstanceId, int] = {}
    done = Replayed()
    while True:
        try:
            entry = _read(log, _ENTRY)
        except EOFError:
            done.is_cut = True
            return done
        if entry is None:
            return done
        again = _Entry(entry.call, [])
        try:
            commands = _make(controller, entry.call, pools)
            again.commands = [_summary(command) for command in commands]
        except Exception as error:  # whatever it is, it is compared
            again.error = type(error).__name__
        done.num_calls += 1
        done.num_commands += len(again.commands)
        if (again.commands, again.error) != (entry.commands, entry.error):
            done.difference = f"call {done.num_calls}, {_difference(entry, again)}"
            return done


def _make(
    controller: Controller, call: _Call, pools: dict[InstanceId, int]
) -> list[Command]:
    match call:
        case _AddGroups(tasks, now, past):
            return controller.add_groups(tasks, now, past)
        case _InstanceUp(info, pool, now):
            pools[info.instance_id] = pool
            return controller.instance_up(info, now)
        case _InstanceDown(instance_id, now, why, partners):
            return controller.instance_down(instance_id, now, why, partners)
        case _InstanceLeft(instance_id, now, why):
            return controller.instance_left(instance_id, now, why)
        case _Progress(report, now):
            return controller.progress(report, now)
        case _CancelGroup(group_id, now):
            return controller.cancel_group(group_id, now)
        case _CancelAll(now, max_requests):
            return controller.cancel_all(now, max_requests)
        case _FailAll(now, why):
            return controller.fail_all(now, why)
        case _Schedule(now):
            return controller.schedule(now)
        case _UsePool(granularity, known):
            pools.update(known)
            controller.use_pool(granularity, pools.__getitem__)
        case _SetMovePrice(price, far):
            controller.set_move_price(price, far)
    return []


def _summary(command: Command) -> list[Any]:
    """What a command says, with checksums of what is long."""
    if isinstance(command, Dispatch):
        c = command.chunk
        sums = [zlib.crc32(c.prompt), zlib.crc32(c.generated)]
        limits = [c.max_tokens, c.min_tokens, c.seed, c.num_reserved_blocks]
        return ["dispatch", c.request_id, c.instance_id, c.chunk_id, *limits, *sums]
    if isinstance(command, Abort):
        return ["abort", command.instance_id, command.chunk_id]
    if isinstance(command, Blame):
        return ["blame", command.num_deaths]
    r = command.response
    sums = [
        zlib.crc32(array("i", r.token_ids).tobytes()),
        zlib.crc32(array("f", r.logprobs).tobytes()),
        zlib.crc32(r.text.encode()),
    ]
    return ["finished", r.request_id, r.finish_reason, len(r.token_ids), *sums]


def _difference(entry: _Entry, again: _Entry) -> str:
    name = type(entry.call).__name__.lstrip("_")
    if entry.error != again.error:
        errors = [each or "no error" for each in (entry.error, again.error)]
        return f"{name}: it ended with {errors[0]}, and now with {errors[1]}"
    for i, (was, now) in enumerate(
        zip(entry.commands, again.commands, strict=False), start=1
    ):
        if was != now:
            return f"{name}, command {i}: it was {was}, and now is {now}"
    return (
        f"{name}: it caused {len(entry.commands)} commands, and now causes "
        f"{len(again.commands)}"
    )


_ENCODER = msgspec.msgpack.Encoder()
_HEADER = msgspec.msgpack.Decoder(_Header)
_ENTRY = msgspec.msgpack.Decoder(_Entry)


def _frame(value: _Header | _Entry) -> bytes:
    data = _ENCODER.encode(value)
    return len(data).to_bytes(_SIZE_BYTES, "big") + data


def _read(log: BinaryIO, decoder: msgspec.msgpack.Decoder[_T]) -> _T | None:
    """The next frame; None at the end.

    Raises:
        EOFError: the log ends within it.
    """
    size = log.read(_SIZE_BYTES)
    if not size:
        return None
    num_bytes = int.from_bytes(size, "big")
    data = log.read(num_bytes)
    if len(size) < _SIZE_BYTES or len(data) < num_bytes:
        raise EOFError
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise ConfigError(f"this is not a log of calls: {error}") from error
