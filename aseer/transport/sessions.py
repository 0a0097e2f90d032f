"""Sessions: messages that arrive once and in order, however often connections are cut.

One end (`Sessions`, over a `Router`) talks with many; the other (`session.py`) makes a
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
from typing import TYPE_CHECKING

import msgspec

from aseer.errors import ProtocolError
from aseer.transport.base import (
    MAX_QUEUED_BYTES,
)
from aseer.transport.link import Link, LinkFull, SessionOver, closing, opening_of
from aseer.watch import WakingClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.transport.base import Router

_log = logging.getLogger("aseer")

# Each end says something that often, so that the other knows of a cut within seconds.
HEARTBEAT_S = 2.0
# Heartbeats that are missed before a connection is given up: a busy peer may be late.
MISSED_HEARTBEATS = 4
# Far more nodes than a cluster has: a peer that only makes sessions costs no more.
MAX_SESSIONS = 10_000


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """What a link sends, as one message of a transport."""

    header: bytes
    payload: bytes


FRAME: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


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
        self._heartbeat_s = min(heartbeat_s, timeout_s / MISSED_HEARTBEATS)
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
