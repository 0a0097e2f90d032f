"""A link: what it keeps, what it refuses, when it waits."""

from __future__ import annotations

import struct

import pytest

from aseer.errors import ProtocolError
from aseer.transport.link import Link, LinkFull, SessionOver, closing, opening_of

HEADER = 24


def sent_by(link: Link, room: int = 1000) -> list[list[bytes]]:
    """What it sends, as far as there is room."""
    sent: list[list[bytes]] = []

    def send(frames: list[bytes]) -> bool:
        if len(sent) == room:
            return False
        sent.append(frames)
        return True

    link.pump(send)
    return sent


def carry(source: Link, target: Link) -> list[bytes]:
    """All that one end sends; what the other takes."""
    taken = [target.take(frames) for frames in sent_by(source)]
    return [message for message in taken if message is not None]


@pytest.fixture
def ends() -> tuple[Link, Link]:
    """Two, connected."""
    client, server = Link(7), Link(7)
    assert server.take(client.hello()) is None
    assert carry(server, client) == []
    assert client.is_open
    assert server.is_open
    return client, server


def test_messages_go_both_ways_and_are_kept_until_acknowledged(
    ends: tuple[Link, Link],
) -> None:
    client, server = ends
    for i in range(3):
        client.put(b"%d" % i)
        server.put(b"-%d" % i)
    assert client.num_waiting == 3
    assert carry(client, server) == [b"0", b"1", b"2"]
    assert client.num_waiting == 3
    assert carry(server, client) == [b"-0", b"-1", b"-2"]
    assert client.num_waiting == 0
    carry(client, server)
    assert server.num_waiting == 0
    assert sent_by(client) == sent_by(server) == [], "nothing is acknowledged for ever"


def test_nothing_is_sent_before_both_have_said_what_they_have() -> None:
    client, server = Link(7), Link(7)
    for link in (client, server):
        link.put(b"x")
        assert sent_by(link) == []
    hello = client.hello()
    assert sent_by(client) == []
    server.take(hello)
    assert carry(server, client) == [b"x"]
    assert carry(client, server) == [b"x"]


def test_a_new_connection_goes_on_behind_what_was_taken(
    ends: tuple[Link, Link],
) -> None:
    client, server = ends
    for i in range(5):
        client.put(b"%d" % i)
    first, second, *_ = sent_by(client)  # of five sent, two arrive
    assert [server.take(first), server.take(second)] == [b"0", b"1"]
    for link in ends:
        link.close()
        assert sent_by(link) == []
    server.take(client.hello())
    assert carry(server, client) == []
    assert client.num_waiting == 3
    assert carry(client, server) == [b"2", b"3", b"4"]


def test_a_welcome_that_found_no_room_is_sent_later() -> None:
    client, server = Link(7), Link(7)
    server.take(client.hello())
    server.put(b"x")
    assert sent_by(server, room=0) == []
    assert carry(server, client) == [b"x"]


def test_a_gap_and_a_repetition_bring_nothing(ends: tuple[Link, Link]) -> None:
    client, server = ends
    for i in range(3):
        client.put(b"%d" % i)
    first, second, third = sent_by(client)
    assert server.take(first) == b"0"
    assert server.take(first) is None
    assert not server.is_broken
    assert server.take(third) is None
    assert server.is_broken
    assert server.take(second) == b"1"
    server.take(client.hello())
    assert not server.is_broken


def test_no_more_is_on_its_way_than_the_window() -> None:
    client, server = Link(7, window_bytes=3 * (HEADER + 10)), Link(7)
    server.take(client.hello())
    carry(server, client)
    for _ in range(10):
        client.put(bytes(10))
    for left in (7, 4, 1, 0):
        carry(client, server)
        carry(server, client)
        assert client.num_waiting == left


def test_an_end_that_stays_away_is_given_up(ends: tuple[Link, Link]) -> None:
    client = Link(7, max_bytes=3 * (HEADER + 10))
    for _ in range(3):
        client.put(bytes(10))
    with pytest.raises(LinkFull, match=r"3 messages \(102 bytes\) wait"):
        client.put(b"")
    server = Link(7)
    server.take(client.hello())
    carry(server, client)
    carry(client, server)
    carry(server, client)
    client.put(bytes(10))


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([], "no message of a link"),
        ([bytes(HEADER)], "no message of a link"),
        ([bytes(HEADER - 1), b""], "no message of a link"),
        ([struct.pack("<QQQ", 8, 1, 0), b"x"], "session 8 came to session 7"),
        ([struct.pack("<QQQ", 7, 1, 1), b"x"], "this end does not know"),
        ([struct.pack("<QQQ", 7, 0, 0), b"?"], "no word between links"),
    ],
)
def test_what_is_not_of_the_session_is_refused(frames: list[bytes], why: str) -> None:
    link = Link(7)
    with pytest.raises(ProtocolError, match=why):
        link.take(frames)
    assert link.take([struct.pack("<QQQ", 7, 1, 0), b"x"]) == b"x"


def test_only_a_session_that_was_never_answered_may_be_new() -> None:
    client, server = Link(7), Link(7)
    client.put(b"x")
    assert opening_of(client.hello()) == (7, "new")
    assert opening_of(client.hello()) == (7, "new")
    server.take(client.hello())
    carry(server, client)
    (message,) = sent_by(client)
    assert opening_of(message) == (7, "")
    assert opening_of(client.hello()) == (7, "again")
    with pytest.raises(ProtocolError, match="no message of a link"):
        opening_of([b"", b""])


def test_an_end_that_misses_a_message_asks_for_a_new_connection(
    ends: tuple[Link, Link],
) -> None:
    client, server = ends
    client.put(b"0")
    client.put(b"1")
    _, second = sent_by(client)
    server.take(second)
    carry(server, client)
    assert client.is_broken
    server.take(client.hello())
    carry(server, client)
    assert carry(client, server) == [b"0", b"1"]
    assert not client.is_broken
    assert not server.is_broken


def test_a_beat_is_heard_and_brings_nothing(ends: tuple[Link, Link]) -> None:
    client, server = ends
    client.beat()
    assert [server.take(frames) for frames in sent_by(client)] == [None]
    assert sent_by(client) == []


def test_the_loss_of_the_last_message_shows_with_the_next_beat(
    ends: tuple[Link, Link],
) -> None:
    client, server = ends
    client.put(b"lost")
    assert len(sent_by(client)) == 1
    server.beat()
    assert carry(server, client) == []
    client.beat()
    assert carry(client, server) == []
    assert server.is_broken
    assert carry(server, client) == []
    assert client.is_broken, "and the end that connects is asked for a new connection"
    server.take(client.hello())
    carry(server, client)
    assert carry(client, server) == [b"lost"]


def test_a_session_that_is_over_is_told_of_with_its_reason(
    ends: tuple[Link, Link],
) -> None:
    client, _ = ends
    with pytest.raises(SessionOver) as over:
        client.take(closing(7, b"that was all"))
    assert over.value.reason == b"that was all"
