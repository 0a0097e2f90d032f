"""An update's weights from any process of the engine's machine.

    engine's process                          any process of the machine
    target = await engine.begin_update()
             --- pickled, however one likes --->  target.send(weights)
    await engine.finish_update(target)

The target is a directory that the engine made, with a file in it that says how far its
one sender is. The sender holds a lock on that file while it sends, which the system
takes away when the process dies: so a sender that works, one that failed and one that
died are told apart without a message between the processes.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from aseer.errors import WeightUpdateError, describe
from aseer.weights.carriers import is_one_of_many
from aseer.weights.checks import ModelSpec
from aseer.weights.direct import engines_of, send_directly
from aseer.weights.files import INDEX, Index, read_index
from aseer.weights.sending import check_source, send, send_async

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from aseer.weights.sending import WeightSource

_SENDER = "sender.json"


class _Sender(msgspec.Struct):
    """What is known of whoever sends.

    Attributes:
        pid: of its process; 0 = nobody has begun.
        error: why it gave up.
        send_s: seconds that it took; None = it is not done.
    """

    pid: int = 0
    error: str = ""
    send_s: float | None = None


class WeightTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Where the tensors of one weight update go; made by `Engine.begin_update`.

    It can be pickled, and used in any process of the engine's machine that runs as the
    same user; such a process needs torch, and no vLLM. One process sends all tensors.

    Attributes:
        version: that the engine has after the update.
        directory: where the tensors are written, or are said to lie.
        model: names, shapes and dtypes that the engine takes.
        transfer: how the tensors go; see `Engine.begin_update`.
    """

    version: int
    directory: str
    model: ModelSpec
    transfer: str = "host"

    def send(self, source: WeightSource) -> None:
        """Check the weights and write them where the engine's instances map them.

        After an error the same or another process may send again. Of an update that was
        begun with transfer="ipc" or "nccl" every process of the trainer calls this.

        Args:
            source: see `Engine.update_weights`; no async iterable. What other processes
                of a sharded trainer do meanwhile (they take the same tensors, so that
                each is gathered) is the caller's to see to.
        Raises:
            WeightUpdateError: a tensor is not what the model takes, another process
                sends or has sent, the update is over, or this is another machine.
        """
        check_source(source, awaits=False)
        if self.transfer != "host":
            self._send_directly(source)
            return
        with self._sending():
            send(source, self.model, Path(self.directory))

    async def send_async(self, source: WeightSource) -> None:
        """As `send`, also for an async iterable of (name, tensor).

        Raises:
            WeightUpdateError: as there.
        """
        check_source(source, awaits=True)
        if self.transfer != "host":
            self._send_directly(source)
            return
        with self._sending():
            await send_async(source, self.model, Path(self.directory))

    def _send_directly(self, source: WeightSource) -> None:
        engines = engines_of(self.directory)
        if engines is None and not is_one_of_many():
            raise WeightUpdateError(
                f"transfer={self.transfer!r} sends from the process that has the "
                "engine, with the other processes of its torch.distributed group; this "
                "process is neither: call send() there, or begin with transfer='host'"
            )
        send_directly(source, self.model, self.transfer, engines)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        directory = Path(self.directory)
        try:
            # The lock goes with this description of the file, however that is closed.
            file = (directory / _SENDER).open("r+b", buffering=0)
        except OSError as error:
            self._raise_over(error)
        with file:
            self._lock(file)
            pid = os.getpid()
            _write(file, _Sender(pid))
            started = time.monotonic()
            try:
                yield
            except BaseException as error:
                _remove_sent(directory)
                _write(file, _Sender(pid, describe(error)))
                gone = not (directory / _SENDER).exists()
                if gone and isinstance(error, OSError | WeightUpdateError):
                    self._raise_over(error)
                raise
            _write(file, _Sender(pid, send_s=time.monotonic() - started))
            if not (directory / _SENDER).exists():
                self._raise_over(None)

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _read(file).pid
            raise WeightUpdateError(
                f"process {pid} is sending the weights of version {self.version}; one "
                "process sends all of them"
            ) from None
        sender = _read(file)
        if sender.send_s is not None:
            raise WeightUpdateError(
                f"process {sender.pid} has sent the weights of version {self.version}; "
                "call Engine.finish_update"
            )

    def _raise_over(self, error: BaseException | None) -> NoReturn:
        raise WeightUpdateError(
            f"there is no update to version {self.version} in {self.directory}: it was "
            "abandoned, took longer than its timeout_s, the engine was closed, or this "
            "process runs on another machine, in another container, or as another user"
        ) from error


class Sent(msgspec.Struct, frozen=True):
    """What was sent, and the seconds that took."""

    index: Index
    send_s: float


def open_target(directory: Path) -> None:
    """Make an update's directory ready for one sender.

    Raises:
        OSError: it is not there, or there is no room.
    """
    (directory / _SENDER).write_bytes(msgspec.json.encode(_Sender()))


def read_sent(directory: Path) -> Sent:
    """What was sent to an update's directory.

    Raises:
        WeightUpdateError: nothing yet, or not all; says what became of the sender.
    """
    try:
        with (directory / _SENDER).open("rb", buffering=0) as file:
            sender = _read(file)
            if sender.send_s is None:
                raise WeightUpdateError(_what_became(sender, file))
    except OSError as error:
        raise WeightUpdateError(f"the new weights are gone: {error}") from error
    return Sent(read_index(str(directory / INDEX)), sender.send_s)


def _what_became(sender: _Sender, file: BinaryIO) -> str:
    if not sender.pid:
        return (
            "no weights were sent; call the target's send() in a process that has them"
        )
    if sender.error:
        return f"process {sender.pid} could not send the weights: {sender.error}"
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (
            f"process {sender.pid} is still sending the weights; finish the update "
            "when send() has returned there"
        )
    return f"process {sender.pid} ended while it was sending the weights"


def _read(file: BinaryIO) -> _Sender:
    file.seek(0)
    try:
        return msgspec.json.decode(file.read(), type=_Sender)
    except msgspec.MsgspecError:  # it is being written at this moment
        return _Sender()


def _write(file: BinaryIO, sender: _Sender) -> None:
    file.seek(0)
    file.write(msgspec.json.encode(sender))
    file.truncate()


def _remove_sent(directory: Path) -> None:
    """Let a later sender begin anew."""
    for path in directory.glob("*"):
        if path.name != _SENDER:
            with suppress(OSError):
                path.unlink()
