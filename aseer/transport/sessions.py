"""Sessions: messages that arrive once and in order, however often connections are cut.

One end (`Sessions`, over a `Router`) talks with many; the other (`Session`) makes a
connection, and a new one whenever that brings nothing any more. What they carry are the
frames of links (`aseer.transport.link`), so both work over any transport.

What always holds:

- What one end puts, the other takes, in order, each once, or the session is over, which
  both ends hear of: whoever closes it says so, and an end that has heard nothing for
  long takes it for closed.
- A connection is never used again: each has an identity of its own, and a router
  listens to a session's latest connection alone.
- Nobody waits for a peer. What waits for one is bounded in bytes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import AseerError, ProtocolError, root_of
from aseer.transport.base import (
    MAX_QUEUED_BYTES,
    ConnectionLost,
    ConnectionRefused,
    HandshakeFailed,
)
from aseer.transport.link import Link, LinkFull, SessionOver, closing, opening_of
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from aseer.transport.base import Dealer, Router

_log = logging.getLogger("aseer")

# Each end says something that often, so that the other knows of a cut within seconds.
HEARTBEAT_S = 2.0
# Heartbeats that are missed before a connection is given up: a busy peer may be late.
_MISSED_HEARTBEATS = 4
# In which a connection is to come about: a busy machine takes seconds for a handshake.
_OPENING_HEARTBEATS = 6
# Between two tries to connect; doubled up to the second, and varied, so that the nodes
# of a cluster do not all come back at once.
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
# A handshake that fails once may have met the end of the other side's process.
_MAX_FAILED_HANDSHAKES = 3
# Far more nodes than a cluster has: a peer that only makes sessions costs no more.
MAX_SESSIONS = 10_000
# Sent in one go before the connection is listened to again.
_BURST = 64


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """What a link sends, as one message of a transport."""

    header: bytes
    payload: bytes


FRAME: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class SessionLost(AseerError):
    """Nothing was heard of the other end for too long."""


class _Open:
    """A session as a router's end has it."""

    __slots__ = ("clock", "heard_at", "id", "is_pumping", "link", "peer")

    def __init__(self, session: int, peer: bytes, clock: WakingClock) -> None:
        self.id = session
        self.peer = peer
        self.link = Link(session, max_bytes=MAX_QUEUED_BYTES)
        self.clock = clock
        self.heard_at = clock.read()
        self.is_pumping = False


class Sessions:
    """The end that waits for others; it has a session with each."""

    def __init__(
        self,
        router: Router[Frame],
        *,
        timeout_s: float,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """Start with no sessions.

        Args:
            timeout_s: a session of which nothing is heard for so long is over.
        """
        self._router = router
        self._timeout_s = timeout_s
        self._heartbeat_s = min(heartbeat_s, timeout_s / _MISSED_HEARTBEATS)
        self._clock = WakingClock(2 * self._heartbeat_s)
        self._open: dict[int, _Open] = {}
        self._by_peer: dict[bytes, _Open] = {}
        self._on_over: Callable[[int, str], None] = lambda session, why: None
        self._on_message: Callable[[int, bytes], None]

    async def run(
        self,
        on_message: Callable[[int, bytes], None],
        on_over: Callable[[int, str], None],
    ) -> None:
        """Send and receive until cancelled.

        Args:
            on_message: called with a session and a message of it; a session's first
                message is the first that is heard of it. If it raises, the session is
                over.
            on_over: called with a session, and why, that was not closed by `close`.
        """
        self._on_message, self._on_over = on_message, on_over
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                self._router.run(self._take, self._on_peer_lost, self._on_peer_gone)
            )
            tasks.create_task(self._beat())

    def put(self, session: int, message: bytes) -> None:
        """Send a message; one to a session that is over is dropped."""
        state = self._open.get(session)
        if state is None:
            return
        try:
            state.link.put(message)
        except LinkFull as error:
            self._end(state, str(error))
        else:
            self._pump_soon(state)

    def close(self, session: int, reason: bytes) -> None:
        """End a session; what waits for the other end is dropped, but for the reason.

        The other end hears of it now, or when it says something the next time; then
        without the reason.
        """
        state = self._open.get(session)
        if state is not None:
            self._send(state, closing(session, reason))
            self._drop(state)

    def is_acknowledged(self, session: int) -> bool:
        """Whether the other end has taken everything; so it is if there is none."""
        state = self._open.get(session)
        return state is None or not state.link.num_waiting

    def _take(self, peer: bytes, frame: Frame) -> None:
        try:
            self._take_frames(peer, [frame.header, frame.payload])
        except ProtocolError as error:
            # Of somebody who has the key, and so one of ours gone wrong: a new
            # connection puts it right.
            _log.debug("a connection brought nonsense: %s", error)
            self._on_peer_gone(peer)

    def _take_frames(self, peer: bytes, frames: list[bytes]) -> None:
        session, opening = opening_of(frames)
        state = self._open.get(session)
        if state is None:
            if opening != "new" or len(self._open) >= MAX_SESSIONS:
                self._router.send(peer, Frame(*closing(session, b"")))
                return
            state = self._open[session] = _Open(session, peer, self._clock)
            self._by_peer[peer] = state
        elif opening and state.peer != peer:
            self._leave_peer(state)
            self._router.forget(state.peer)
            state.peer = peer
            self._by_peer[peer] = state
        elif state.peer != peer:
            return  # of a connection that was given up
        state.heard_at = self._clock.read()
        try:
            message = state.link.take(frames)
        except SessionOver as over:
            why = over.reason.decode(errors="replace")
            self._drop(state)
            self._on_over(session, why or "the other end closed the session")
            return
        self._pump_soon(state)
        if message is not None:
            try:
                self._on_message(session, message)
            except Exception as error:
                _log.exception("a message of session %x could not be handled", session)
                self._end(state, f"its message could not be handled: {error!r}")

    def _pump_soon(self, state: _Open) -> None:
        if not state.is_pumping:
            state.is_pumping = True
            asyncio.get_running_loop().call_soon(self._pump, state)

    def _pump(self, state: _Open) -> None:
        state.is_pumping = False
        if self._open.get(state.id) is state:
            state.link.pump(lambda frames: self._send(state, frames))

    def _send(self, state: _Open, frames: list[bytes]) -> bool:
        self._router.send(state.peer, Frame(*frames))
        return True

    def _on_peer_gone(self, peer: bytes) -> None:
        """What was sent over this connection just now is lost; a new one will ask."""
        state = self._by_peer.get(peer)
        if state is not None:
            state.link.close()

    def _on_peer_lost(self, peer: bytes, why: str) -> None:
        self._on_peer_gone(peer)
        self._router.forget(peer)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            now = self._clock.read()
            for state in list(self._open.values()):
                silent_s = now - state.heard_at
                if silent_s > self._timeout_s:
                    self._end(state, f"nothing was heard of it for {silent_s:.0f} s")
                else:
                    state.link.beat()
                    self._pump(state)

    def _end(self, state: _Open, why: str) -> None:
        self.close(state.id, b"")
        self._on_over(state.id, why)

    def _drop(self, state: _Open) -> None:
        del self._open[state.id]
        self._leave_peer(state)

    def _leave_peer(self, state: _Open) -> None:
        """What waits for a connection that is given up goes with it."""
        if self._by_peer.get(state.peer) is state:
            del self._by_peer[state.peer]


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
    ) -> None:
        """Begin a session; nothing is connected yet.

        Args:
            connect: makes a connection under an identity; raises `ConnectionLost` if
                there is none to be had now.
            timeout_s: the session is over if nothing is heard for so long.
        """
        self._connect = connect
        self._heartbeat_s = min(heartbeat_s, timeout_s / _MISSED_HEARTBEATS)
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
        self._heartbeat_s = min(self._heartbeat_s, timeout_s / _MISSED_HEARTBEATS)

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
                # network that breaks handshakes off.
                is_key = isinstance(error, HandshakeFailed) and not self._link.was_known
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
            elif silent_s > _MISSED_HEARTBEATS * self._heartbeat_s:
                raise ConnectionLost(f"it brought nothing for {silent_s:.0f} s")
