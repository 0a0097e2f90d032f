"""The process's turns are short while an engine is open, and afterwards as before."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import pytest

from aseer.runtime.loop_thread import LoopThread
from aseer.runtime.turns import TURN_S, short_turns

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

SOON_S = 10.0


@pytest.fixture(params=[0.005, 0.00025])
def before_s(request: pytest.FixtureRequest) -> Iterator[float]:
    """A setting of the user's."""
    kept = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield request.param
    sys.setswitchinterval(kept)


def test_turns_are_short_until_the_last_user_is_gone(before_s: float) -> None:
    expected = pytest.approx(min(TURN_S, before_s))
    with short_turns():
        with short_turns():
            assert sys.getswitchinterval() == expected
        assert sys.getswitchinterval() == expected
    assert sys.getswitchinterval() == pytest.approx(before_s)


def test_what_the_user_sets_meanwhile_stays() -> None:
    kept = sys.getswitchinterval()
    try:
        with short_turns():
            sys.setswitchinterval(0.003)
        assert sys.getswitchinterval() == pytest.approx(0.003)
    finally:
        sys.setswitchinterval(kept)


def test_an_error_ends_them_too() -> None:
    kept = sys.getswitchinterval()
    with pytest.raises(KeyError), short_turns():
        raise KeyError
    assert sys.getswitchinterval() == kept


def test_an_engines_thread_has_them() -> None:
    kept = sys.getswitchinterval()
    seen: list[float] = []
    thread, is_up = LoopThread("test"), threading.Event()

    async def main(stop: asyncio.Event) -> None:
        seen.append(sys.getswitchinterval())
        is_up.set()
        await stop.wait()

    thread.start(main)
    assert is_up.wait(SOON_S)
    thread.request_stop()
    assert thread.join(SOON_S)
    assert seen == [pytest.approx(TURN_S)]
    assert sys.getswitchinterval() == kept
