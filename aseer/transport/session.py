"""The end of a session that connects, and connects anew (see `sessions.py`)."""

from __future__ import annotations

import asyncio
import random
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from aseer.errors import AseerError, ProtocolError, root_of
from aseer.transport.base import (
    MAX_QUEUED_BYTES,
    ConnectionLost,
    ConnectionRefused,
    HandshakeFailed,
)
from aseer.transport.link import Link, closing
from aseer.transport.sessions import HEARTBEAT_S, MISSED_HEARTBEATS, Frame
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from aseer.transport.base import Dealer

# In which a connection is to come about: a busy machine takes seconds for a handshake.
_OPENING_HEARTBEATS = 6
# Between two tries to connect; doubled up to the second, and varied, so that the nodes
# of a cluster do not all come back at once.
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
# A handshake that fails once may have met the end of the other side's process.
_MAX_FAILED_HANDSHAKES = 3
# Sent in one go before the connection is listened to again.
_BURST = 64


class SessionLost(AseerError):
    """Nothing was heard of the other end for too long."""


def _ends_session(error: BaseException) -> bool:
    return not isinstance(error, ConnectionLost)


class Session:
    """The end that connects."""

    def __init__(
        self,
        connect: Callable[[bytes], AbstractAsyncContextManager[Dealer[Frame]]],
        *,
        timeout_s: float,
        heartbeat_s: float = HEARTBEAT_S,
        rng: random.Random | None = None,
        keys_are_right: bool = False,
    ) -> None:
        """Begin a session; nothing is connected yet.

        Args:
            connect: makes a connection under an identity; raises `ConnectionLost` if
                there is none to be had now.
            timeout_s: the session is over if nothing is heard for so long.
            keys_are_right: an earlier session with that end has shown it.
        """
        self._keys_are_right = keys_are_right
        self._connect = connect
        self._heartbeat_s = min(heartbeat_s, timeout_s / MISSED_HEARTBEATS)
        self._rng = rng or random.Random()
        self._link = Link(secrets.randbits(63) | 1, max_bytes=MAX_QUEUED_BYTES)
        self._changed = asyncio.Event()
        self._clock = WakingClock(2 * self._heartbeat_s)
        self._heard_at = self._clock.read()
        self._timeout_s = timeout_s
        self.num_connections = 0
        self.trouble = ""
        """Why the last connection ended, or none could be made."""

    @property
    def timeout_s(self) -> float:
        """The session is over if nothing is heard for so long; it may be changed."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._heartbeat_s = min(self._heartbeat_s, timeout_s / MISSED_HEARTBEATS)

    def put(self, message: bytes) -> None:
        """Send a message, now or when there is a connection.

        Raises:
            LinkFull: the other end has been away for too long.
        """
        self._link.put(message)
        self._changed.set()

    @property
    def is_acknowledged(self) -> bool:
        """Whether the other end has taken everything."""
        return not self._link.num_waiting

    async def run(self, on_message: Callable[[bytes], None]) -> None:
        """Send and receive until cancelled, or the session is over.

        Raises:
            SessionOver: the other end has closed it.
            SessionLost: nothing was heard for `timeout_s`.
            ConnectionRefused: there is an other end, which will never talk with us.
        """
        pause_s = _FIRST_PAUSE_S
        num_failed_handshakes = 0
        while True:
            heard_before = self._heard_at
            try:
                await self._talk(on_message)
            except ConnectionLost as error:
                self.trouble = str(error)
                # Once the other end has answered, the keys are right, and it is the
                # network that breaks handshakes off; or a proxy, whose other side has
                # gone.
                was_answered = self._keys_are_right or self._link.was_known
                if isinstance(error, HandshakeFailed) and was_answered:
                    self.trouble = "connections break before they are encrypted"
                is_key = isinstance(error, HandshakeFailed) and not was_answered
                num_failed_handshakes = num_failed_handshakes + 1 if is_key else 0
                if num_failed_handshakes == _MAX_FAILED_HANDSHAKES:
                    raise ConnectionRefused(self.trouble) from error
            finally:
                self._link.close()
            if self._heard_at != heard_before:
                pause_s = _FIRST_PAUSE_S
            await self._pause(pause_s * self._rng.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _pause(self, pause_s: float) -> None:
        """Wait before the next connection, unless the session is over."""
        over_at = self._clock.read() + pause_s
        while True:
            now = self._clock.read()
            silent_s = now - self._heard_at
            if silent_s > self._timeout_s:
                raise SessionLost(
                    f"nothing was heard for {silent_s:.0f} s ({self.trouble})"
                )
            if now >= over_at:
                return
            await asyncio.sleep(min(over_at - now, self._heartbeat_s))

    async def close(self, reason: str, timeout_s: float) -> None:
        """Tell the other end that the session is over; `run` must have ended."""
        with suppress(ConnectionLost, TimeoutError):
            async with asyncio.timeout(timeout_s):
                identity = secrets.token_bytes(8)
                async with self._connect(b"a" + identity) as dealer:
                    await dealer.send(Frame(*self._link.hello()))
                    frames = closing(self._link.session, reason.encode())
                    await dealer.send(Frame(*frames))

    async def _talk(self, on_message: Callable[[bytes], None]) -> None:
        """Use one connection, until it is of no use."""
        identity = b"a" + secrets.token_bytes(8)  # a ROUTER's own begin with a 0
        self.num_connections += 1
        self._connected_at = self._clock.read()
        async with self._connect(identity) as dealer:
            failure: BaseException | None = None
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._send_all(dealer))
                    tasks.create_task(self._receive_all(dealer, on_message))
                    tasks.create_task(self._watch())
            except* AseerError as group:
                # What ends the session counts for more than what ends a connection.
                failure = max(map(root_of, group.exceptions), key=_ends_session)
            if failure is not None:
                raise failure

    async def _send_all(self, dealer: Dealer[Frame]) -> None:
        await dealer.send(Frame(*self._link.hello()))
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        while True:
            self._changed.clear()
            frames: list[list[bytes]] = []

            def take(sent: list[bytes], frames: list[list[bytes]] = frames) -> bool:
                if len(frames) == _BURST:
                    return False
                frames.append(sent)
                return True

            self._link.pump(take)
            for sent in frames:
                await dealer.send(Frame(*sent))
            if frames:
                sent_at = loop.time()
            if len(frames) == _BURST:
                continue
            # What is heard meanwhile does not put the beat off.
            with suppress(TimeoutError):
                async with asyncio.timeout_at(sent_at + self._heartbeat_s):
                    await self._changed.wait()
            if loop.time() >= sent_at + self._heartbeat_s:
                self._link.beat()
                sent_at = loop.time()

    async def _receive_all(
        self, dealer: Dealer[Frame], on_message: Callable[[bytes], None]
    ) -> None:
        while True:
            frame = await dealer.receive()
            try:
                message = self._link.take([frame.header, frame.payload])
            except ProtocolError as error:
                raise ConnectionLost(f"it brings nonsense: {error}") from error
            self._heard_at = self._clock.read()
            if self._link.is_broken:
                raise ConnectionLost("a message was lost on it")
            self._changed.set()  # to acknowledge it
            if message is not None:
                on_message(message)

    async def _watch(self) -> None:
        """Give a connection up that brings nothing, or does not come about."""
        while True:
            await asyncio.sleep(self._heartbeat_s / 2)
            now = self._clock.read()
            waited_s = now - self._connected_at
            silent_s = min(now - self._heard_at, waited_s)
            if not self._link.is_open:
                if waited_s > _OPENING_HEARTBEATS * self._heartbeat_s:
                    raise ConnectionLost("it was not answered")
            elif silent_s > MISSED_HEARTBEATS * self._heartbeat_s:
                raise ConnectionLost(f"it brought nothing for {silent_s:.0f} s")
