"""What an engine answers to each call in each state, and whose turn it is then."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import get_args

import pytest

from aseer.errors import EngineClosedError, EngineError, RolloutInProgressError
from aseer.runtime.activity import (
    TAKEN,
    Activity,
    Call,
    Taking,
    Verdict,
    decide,
)
from aseer.runtime.claims import Claims

# A row a state, a column a call.
TABLE = """
                ROLLOUT  UPDATE  UPDATE_AFTER  UPDATE_INSTEAD  SLEEP   WAKE    ABORT
IDLE            TAKE     TAKE    TAKE          TAKE            TAKE    DONE    DONE
BEGINNING       WAIT     WAIT    WAIT          WAIT            WAIT    DONE    WAIT
ROLLING_OUT     BUSY     BUSY    WAIT          ABORT           BUSY    DONE    ABORT
LEFT            END      END     END           END             END     DONE    END
UPDATING        WAIT     WAIT    WAIT          WAIT            WAIT    WAIT    DONE
FALLING_ASLEEP  WAIT     WAIT    WAIT          WAIT            WAIT    WAIT    DONE
ASLEEP          SLEEPS   SLEEPS  SLEEPS        SLEEPS          DONE    TAKE    DONE
WAKING          WAIT     WAIT    WAIT          WAIT            WAIT    WAIT    DONE
HALF_AWAKE      SLEEPS   TAKE    TAKE          TAKE            SLEEPS  TAKE    DONE
CLOSING         CLOSED   CLOSED  CLOSED        CLOSED          CLOSED  CLOSED  CLOSED
"""


class Rollout:
    """A rollout in the way, which somebody may have left."""

    def __init__(self, claims: Claims, *, left_by: object = None) -> None:
        self._claims = claims
        self._left_by = left_by
        self.ended: list[str] = []
        self.over: list = []

    def is_held_up_by(self, asker: object) -> bool:
        return False

    def was_left(self, asker: object) -> bool:
        return self._left_by is not None and self._left_by in ("everyone", asker)

    def description(self) -> str:
        return "of a test's"

    async def end(self) -> None:
        self.ended.append("end")
        self.over.pop().release()

    async def abort(self) -> None:
        self.ended.append("abort")
        self.over.pop().release()


def test_the_table_answers_every_pair():
    header, *rows = (line.split() for line in TABLE.strip().splitlines())
    calls = [Call[name] for name in header]
    assert calls == list(Call)
    assert [row[0] for row in rows] == [activity.name for activity in Activity]
    for name, *verdicts in rows:
        answers = [decide(Activity[name], call).name for call in calls]
        assert answers == verdicts, name


def test_answers_are_about_what_the_engine_is_doing():
    """`Claims` has a rollout to end only while there is one, and so on."""
    about = {
        Verdict.TAKE: {Activity.IDLE, Activity.ASLEEP, Activity.HALF_AWAKE},
        Verdict.SLEEPS: {Activity.ASLEEP, Activity.HALF_AWAKE},
        Verdict.CLOSED: {Activity.CLOSING},
        Verdict.BUSY: {Activity.ROLLING_OUT},
        Verdict.ABORT: {Activity.ROLLING_OUT},
        Verdict.END: {Activity.LEFT},
    }
    for verdict, activities in about.items():
        pairs = product(Activity, Call)
        assert {a for a, c in pairs if decide(a, c) is verdict} == activities


def test_a_call_that_has_the_engine_in_the_end_always_has_something_to_do():
    for activity, call in product(Activity, get_args(Taking)):
        assert decide(activity, call) is not Verdict.DONE
    takes_it = {call for call in Call if decide(Activity.IDLE, call) is Verdict.TAKE}
    assert takes_it == {*get_args(Taking), Call.SLEEP}


def test_every_call_that_takes_the_engine_has_something_to_do():
    takes = {c for a, c in product(Activity, Call) if decide(a, c) is Verdict.TAKE}
    assert takes == set(TAKEN)


async def rolling_out(*, left_by: object = None) -> tuple[Claims, Rollout]:
    claims = Claims()
    claim = await claims.take(Call.ROLLOUT)
    rollout = Rollout(claims, left_by=left_by)
    rollout.over.append(claim)
    claims.set_rollout(rollout)
    return claims, rollout


async def test_a_rollout_that_begins_is_waited_for_and_then_in_the_way() -> None:
    claims = Claims()
    claim = await claims.take(Call.ROLLOUT)
    async with asyncio.TaskGroup() as tasks:
        abort = tasks.create_task(claims.take(Call.ABORT))
        await settled()
        assert not abort.done()
        rollout = Rollout(claims)
        rollout.over.append(claim)
        claims.set_rollout(rollout)
    assert rollout.ended == ["abort"]
    assert claims.activity is Activity.IDLE


async def test_a_rollout_that_did_not_begin_gives_the_engine_back() -> None:
    claims = Claims()
    claim = await claims.take(Call.ROLLOUT)
    assert claim is not None
    async with asyncio.TaskGroup() as tasks:
        other = tasks.create_task(claims.take(Call.ROLLOUT))
        await settled()
        claim.release()
    assert other.result() is not None


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_rollout_in_progress_is_in_the_way():
    claims, _ = await rolling_out()
    with pytest.raises(RolloutInProgressError, match=r"of a test's is in.*close it"):
        await claims.take(Call.ROLLOUT)
    with pytest.raises(RolloutInProgressError, match="give pause="):
        await claims.take(Call.UPDATE)
    assert claims.activity is Activity.ROLLING_OUT


@pytest.mark.parametrize("call", [Call.ROLLOUT, Call.UPDATE, Call.SLEEP])
async def test_a_rollout_that_was_left_is_ended_first(call):
    claims, rollout = await rolling_out(left_by="everyone")
    assert await claims.take(call) is not None
    assert rollout.ended == ["end"]
    assert claims.activity is TAKEN[call]


async def test_a_rollout_its_reader_gave_up_is_in_nobodys_way_but_others():
    claims, rollout = await rolling_out(left_by="me")
    with pytest.raises(RolloutInProgressError):
        await claims.take(Call.ROLLOUT, "somebody else")
    assert await claims.take(Call.ROLLOUT, "me") is not None
    assert rollout.ended == ["end"]


async def test_an_update_may_abort_a_rollout():
    claims, rollout = await rolling_out()
    assert await claims.take(Call.UPDATE_INSTEAD) is not None
    assert rollout.ended == ["abort"]


@pytest.mark.parametrize("first", [Call.UPDATE, Call.SLEEP])
@pytest.mark.parametrize("then", [Call.ROLLOUT, Call.UPDATE, Call.SLEEP])
async def test_what_waits_is_decided_anew_when_its_turn_comes(first, then):
    """Whatever happened while a call waited, it acts on what is true when it does."""
    claims = Claims()
    claim = await claims.take(first)
    answers = []

    async def ask():
        try:
            answers.append(await claims.take(then))
        except EngineError as error:
            answers.append(str(error))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ask())
        await settled()
        assert answers == []
        claim.become(Activity.ASLEEP)
    asleep = "the engine is asleep; wake() it first"
    assert answers == [None if then is Call.SLEEP else asleep]
    assert claims.activity is Activity.ASLEEP


async def test_those_who_wait_are_served_in_turn():
    claims = Claims()
    claim = await claims.take(Call.UPDATE)
    served = []

    async def update(name):
        mine = await claims.take(Call.UPDATE)
        served.append(name)
        await settled()
        mine.release()

    async with asyncio.TaskGroup() as tasks:
        for name in range(5):
            tasks.create_task(update(name))
        await settled()
        claim.release()
    assert served == [0, 1, 2, 3, 4]
    assert claims.activity is Activity.IDLE


async def test_a_call_that_gives_up_waiting_holds_nothing():
    claims = Claims()
    claim = await claims.take(Call.UPDATE)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await claims.take(Call.ROLLOUT)
    assert not claims._waiting
    claim.release()
    assert await claims.take(Call.SLEEP) is not None


async def test_giving_back_twice_takes_nothing_from_the_next():
    claims = Claims()
    first = await claims.take(Call.UPDATE)
    first.release()
    assert await claims.take(Call.SLEEP) is not None
    first.release()
    first.become(Activity.IDLE)
    assert claims.activity is Activity.FALLING_ASLEEP


@pytest.mark.parametrize("left_by", [None, "everyone"])
async def test_an_abort_ends_only_the_rollout_that_it_saw(left_by):
    claims, rollout = await rolling_out(left_by=left_by)
    loop = asyncio.get_running_loop()
    began: list[Rollout] = []

    async def end() -> None:
        rollout.ended.append("end")
        rollout.over.pop().release()
        claim = await claims.take(Call.ROLLOUT)  # of another thread, in between
        began.append(Rollout(claims))
        began[0].over.append(claim)
        claims.set_rollout(began[0])

    rollout.end = rollout.abort = end
    await asyncio.wait_for(loop.create_task(claims.take(Call.ABORT)), 5)
    assert rollout.ended == ["end"]
    assert began[0].ended == []
    assert claims.activity is Activity.ROLLING_OUT


async def test_closing_refuses_those_who_wait_and_those_who_come():
    claims = Claims()
    claim = await claims.take(Call.UPDATE)
    error = EngineClosedError("closed")

    async def refused():
        with pytest.raises(EngineClosedError):
            await claims.take(Call.ROLLOUT)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(refused())
        await settled()
        claims.close(lambda: error)
    claim.release()
    assert claims.activity is Activity.CLOSING
    await refused()


async def test_an_update_of_a_half_awake_engine_leaves_it_half_awake() -> None:
    claims = Claims()
    claim = await claims.take(Call.SLEEP)
    claim.become(Activity.ASLEEP)
    claim = await claims.take(Call.WAKE)
    claim.become(Activity.HALF_AWAKE)
    with pytest.raises(EngineError, match="awake but for its KV cache; wake"):
        await claims.take(Call.ROLLOUT)
    update = await claims.take(Call.UPDATE)
    assert claims.activity is Activity.UPDATING
    async with asyncio.TaskGroup() as tasks:
        waking = tasks.create_task(claims.take(Call.WAKE))
        await settled()
        assert not waking.done(), "half of it is asleep"
        update.release()
    rest = waking.result()
    assert claims.activity is Activity.WAKING
    rest.release()
    assert claims.activity is Activity.IDLE
