"""Messages that arrive once and in order, over connections that come and go.

Two ends share a session. Every frame says which it is of, the number of its message and
the number of the last message that its sender has taken:

    frames       [session, number, acknowledged: 3 x u64, little-endian] [payload]
    number 0     no message, but a word

A message is kept until it is acknowledged. Nothing is resent while a connection stands:
one that loses nothing needs no more, and resending by a clock makes a slow connection
slower. Each new connection begins with a word of the end that made it, NEW until its
first answer and HELLO from then on, and a WELCOME; both say what was taken, and both
ends go on behind that. So an end that knows no such session creates it for NEW, and
answers HELLO with CLOSED: its messages cannot be followed any more.

Between messages an end says how many it has sent (SENT), at least once a heartbeat, so
that the loss of the last one shows, too.

What always holds, whatever is lost, doubled, late or overtaken: what is taken is the
beginning of what was put, in order, each once. What is put is taken once connections
stand long enough; an end whose link `is_broken` should make a new one, or asks the
other end for one (AGAIN). Pure: whoever has the link has the socket and the clock.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Literal

from aseer.errors import AseerError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_HEADER = struct.Struct("<QQQ")
_NUMBER = struct.Struct("<Q")
_NEW = b"N"
_HELLO = b"H"
_WELCOME = b"W"
_AGAIN = b"A"
_SENT = b"S"  # and behind it, the number of the last message that was sent
_CLOSED = b"X"  # and behind it, why
# Of messages that are not acknowledged: half a minute of a large node's reports, which
# is as long as a node may be away.
MAX_BYTES = 64 << 20
# Of them, on their way: more than a fast network holds in a round trip.
WINDOW_BYTES = 8 << 20


class LinkFull(AseerError):
    """The other end has been away for too long; its session is over."""


class SessionOver(AseerError):
    """The other end has closed the session; `reason` is what it says of it."""

    def __init__(self, reason: bytes) -> None:
        super().__init__("the other end has closed the session")
        self.reason = reason


def opening_of(frames: Sequence[bytes]) -> tuple[int, Literal["new", "again", ""]]:
    """The session that frames are of, and whether they begin it, or a connection.

    Raises:
        ProtocolError: they are no frames of a link.
    """
    _check(frames)
    session, number, _ = _HEADER.unpack(frames[0])
    if number or frames[1] not in (_NEW, _HELLO):
        return session, ""
    return session, "new" if frames[1] == _NEW else "again"


def closing(session: int, reason: bytes) -> list[bytes]:
    """What tells the other end that a session is over, whether known here or not."""
    return [_HEADER.pack(session, 0, 0), _CLOSED + reason]


def _check(frames: Sequence[bytes]) -> None:
    if len(frames) != 2 or len(frames[0]) != _HEADER.size:
        sizes = [len(frame) for frame in frames]
        raise ProtocolError(
            f"frames of {sizes} bytes are no message of a link: it has two, of "
            f"which the first has {_HEADER.size}"
        )


class Link:
    """One end of a session."""

    def __init__(
        self,
        session: int,
        *,
        max_bytes: int = MAX_BYTES,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """Begin a session, without a connection.

        Args:
            session: the same at both ends, and never used again.
            max_bytes: kept for the other end. window_bytes: sent before it must have
                acknowledged some.
        """
        self._session = session
        self._max_bytes = max_bytes
        self._window_bytes = window_bytes
        self._unsent: deque[tuple[int, bytes]] = deque()
        self._unacknowledged: deque[tuple[int, bytes]] = deque()  # sent, and before it
        self._num_put = 0
        self._num_taken = 0
        self._num_bytes = 0
        self._num_bytes_sent = 0  # of what is not acknowledged
        self._owes_welcome = False
        self._was_welcomed = False
        self._owes_ack = False
        self._is_open = False
        self.is_broken = False
        """A message is missing: nothing arrives any more until there is a new hello."""

    @property
    def session(self) -> int:
        """The number that both ends know the session by."""
        return self._session

    @property
    def is_open(self) -> bool:
        """Whether messages may be sent: both ends have said what they have."""
        return self._is_open

    @property
    def was_known(self) -> bool:
        """Whether the other end has ever answered."""
        return self._was_welcomed

    @property
    def num_waiting(self) -> int:
        """Messages that the other end has not acknowledged."""
        return len(self._unsent) + len(self._unacknowledged)

    def put(self, payload: bytes) -> None:
        """Send a message, now or when there is a connection.

        Raises:
            LinkFull: there is no room for it, and the link is of no more use.
        """
        num_bytes = self._num_bytes + len(payload) + _HEADER.size
        if num_bytes > self._max_bytes:
            raise LinkFull(
                f"{self.num_waiting} messages ({self._num_bytes} bytes) wait to be "
                f"acknowledged; at most {self._max_bytes} bytes are kept"
            )
        self._num_bytes = num_bytes
        self._num_put += 1
        self._unsent.append((self._num_put, payload))

    def hello(self) -> list[bytes]:
        """What goes first over a new connection; nothing else does until the answer."""
        self._is_open = self.is_broken = self._owes_welcome = False
        return self._frames(0, _HELLO if self._was_welcomed else _NEW)

    def close(self) -> None:
        """The connection is gone: keep everything for the next."""
        self._is_open = self._owes_welcome = False

    def beat(self) -> None:
        """Have the next `pump` send something, so that the other end hears of us."""
        self._owes_ack = True

    def pump(self, send: Callable[[list[bytes]], bool]) -> None:
        """Send what there is to send, as far as `send` takes it, which it says."""
        if not self._is_open:
            return
        if self._owes_welcome:
            if not send(self._frames(0, _WELCOME)):
                return
            self._owes_welcome = False
        while self._unsent and self._num_bytes_sent < self._window_bytes:
            number, payload = self._unsent[0]
            if not send(self._frames(number, payload)):
                return
            self._unacknowledged.append(self._unsent.popleft())
            self._num_bytes_sent += len(payload) + _HEADER.size
        if self._owes_ack:
            num_sent = self._unsent[0][0] - 1 if self._unsent else self._num_put
            sent = _SENT + _NUMBER.pack(num_sent)
            send(self._frames(0, _AGAIN if self.is_broken else sent))

    def take(self, frames: Sequence[bytes]) -> bytes | None:
        """What came; the next message, if it is that. Call `pump` soon after.

        Raises:
            ProtocolError: the frames are not of this session; the connection is of no
                use.
            SessionOver: the other end has closed the session.
        """
        number, acknowledged, payload = self._read(frames)
        self._drop_acknowledged(acknowledged)
        if not number:
            if payload == _AGAIN:
                self.is_broken = True
            elif payload[:1] == _SENT:
                if _NUMBER.unpack_from(payload, 1)[0] > self._num_taken:
                    self.is_broken = self._owes_ack = True
            else:
                self._was_welcomed |= payload == _WELCOME
                self._begin(is_hello=payload != _WELCOME)
            return None
        self._owes_ack = True  # of one that came twice, too: its sender may not know
        if number != self._num_taken + 1:
            self.is_broken |= number > self._num_taken
            return None
        self._num_taken = number
        return payload

    def _read(self, frames: Sequence[bytes]) -> tuple[int, int, bytes]:
        _check(frames)
        session, number, acknowledged = _HEADER.unpack(frames[0])
        if session != self._session:
            raise ProtocolError(
                f"a message of session {session:x} came to session {self._session:x}"
            )
        if acknowledged > self._num_put:
            raise ProtocolError(
                f"message {acknowledged} was acknowledged, of {self._num_put}: the "
                "other end goes on with a session that this end does not know"
            )
        if not number and frames[1][:1] == _CLOSED:
            raise SessionOver(frames[1][1:])
        is_sent = frames[1][:1] == _SENT and len(frames[1]) == 1 + _NUMBER.size
        if not (number or is_sent or frames[1] in (_NEW, _HELLO, _WELCOME, _AGAIN)):
            raise ProtocolError(f"{frames[1][:20]!r} is no word between links")
        return number, acknowledged, frames[1]

    def _begin(self, *, is_hello: bool) -> None:
        """The other end has said what it has: all behind that is sent again."""
        self._unsent.extendleft(reversed(self._unacknowledged))
        self._unacknowledged.clear()
        self._num_bytes_sent = 0
        self._is_open = True
        if is_hello:
            self._owes_welcome = True
            self.is_broken = False

    def _drop_acknowledged(self, number: int) -> None:
        for messages in (self._unacknowledged, self._unsent):
            while messages and messages[0][0] <= number:
                size = len(messages.popleft()[1]) + _HEADER.size
                self._num_bytes -= size
                if messages is self._unacknowledged:
                    self._num_bytes_sent -= size

    def _frames(self, number: int, payload: bytes) -> list[bytes]:
        self._owes_ack = False
        return [_HEADER.pack(self._session, number, self._num_taken), payload]
