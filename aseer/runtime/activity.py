"""What an engine is doing, and what it answers to a call meanwhile: one pure table.

            rollout             its journal is read                over
        IDLE ----------> BEGINNING ------------> ROLLING_OUT ---------------> IDLE
         |                                            | its user left, or
         |                                            | gave up waiting
         |                                            +----> LEFT ----------> IDLE
         |  update                     done, or refused
         +-------------> UPDATING -------------------------> IDLE
         |  sleep                            wake
         +-------------> FALLING_ASLEEP -> ASLEEP -> WAKING -> IDLE
                                             | wake of       ^
                                             | weights alone | wake of the rest
                                             +----> HALF_AWAKE <-> UPDATING

        CLOSING, from anywhere, is the end.

A call that changes what the engine does is *claimed* before anything is awaited: the
table says whether the call may take the engine now, has to wait for a change and ask
again, or is refused. Nothing is decided from what was true before an `await`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping


class Activity(StrEnum):
    """What the engine is doing."""

    IDLE = "idle"
    BEGINNING = "beginning a rollout"
    ROLLING_OUT = "rolling out"
    LEFT = "ending a rollout that was left"
    UPDATING = "updating its weights"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"
    HALF_AWAKE = "awake but for its KV cache"
    CLOSING = "closing"


class Call(StrEnum):
    """What somebody wants of the engine.

    A weight update may refuse to wait for a rollout in progress (UPDATE), wait for its
    end (UPDATE_AFTER), or abort it (UPDATE_INSTEAD).
    """

    ROLLOUT = "rollout"
    UPDATE = "update_weights"
    UPDATE_AFTER = "update_weights(pause='wait')"
    UPDATE_INSTEAD = "update_weights(pause='abort')"
    SLEEP = "sleep"
    WAKE = "wake"
    ABORT = "abort_rollout"


#: Calls that have the engine in the end, unless they are refused: for them there is
#: always something to do.
Taking = Literal[Call.ROLLOUT, Call.UPDATE, Call.UPDATE_AFTER, Call.UPDATE_INSTEAD]


class Verdict(StrEnum):
    """What a call is answered."""

    TAKE = "the call has the engine"
    WAIT = "ask again when the engine does something else"
    END = "end the rollout that was left, then ask again"
    ABORT = "abort the rollout in progress, then ask again"
    DONE = "nothing is to be done"
    BUSY = "refused: a rollout is in progress"
    SLEEPS = "refused: the engine is asleep"
    CLOSED = "refused: the engine is closed"


#: What the engine does once a call has taken it. ABORT never takes it.
TAKEN: Mapping[Call, Activity] = {
    Call.ROLLOUT: Activity.BEGINNING,
    Call.UPDATE: Activity.UPDATING,
    Call.UPDATE_AFTER: Activity.UPDATING,
    Call.UPDATE_INSTEAD: Activity.UPDATING,
    Call.SLEEP: Activity.FALLING_ASLEEP,
    Call.WAKE: Activity.WAKING,
}


def decide(activity: Activity, call: Call) -> Verdict:
    """What a call is answered while the engine is doing `activity`."""
    return _TABLE[activity].get(call, _OTHERWISE[activity])


_OTHERWISE: Mapping[Activity, Verdict] = {
    Activity.IDLE: Verdict.TAKE,
    Activity.BEGINNING: Verdict.WAIT,
    Activity.ROLLING_OUT: Verdict.BUSY,
    Activity.LEFT: Verdict.END,
    Activity.UPDATING: Verdict.WAIT,
    Activity.FALLING_ASLEEP: Verdict.WAIT,
    Activity.ASLEEP: Verdict.SLEEPS,
    Activity.WAKING: Verdict.WAIT,
    Activity.HALF_AWAKE: Verdict.TAKE,
    Activity.CLOSING: Verdict.CLOSED,
}
_TABLE: Mapping[Activity, Mapping[Call, Verdict]] = {
    Activity.IDLE: {Call.WAKE: Verdict.DONE, Call.ABORT: Verdict.DONE},
    Activity.BEGINNING: {Call.WAKE: Verdict.DONE},
    Activity.ROLLING_OUT: {
        Call.UPDATE_AFTER: Verdict.WAIT,
        Call.UPDATE_INSTEAD: Verdict.ABORT,
        Call.WAKE: Verdict.DONE,
        Call.ABORT: Verdict.ABORT,
    },
    Activity.LEFT: {Call.WAKE: Verdict.DONE},
    # It may be that of an engine that is half awake.
    Activity.UPDATING: {Call.ABORT: Verdict.DONE},
    Activity.FALLING_ASLEEP: {Call.ABORT: Verdict.DONE},
    Activity.ASLEEP: {
        Call.SLEEP: Verdict.DONE,
        Call.WAKE: Verdict.TAKE,
        Call.ABORT: Verdict.DONE,
    },
    Activity.WAKING: {Call.ABORT: Verdict.DONE},
    Activity.HALF_AWAKE: {
        Call.ROLLOUT: Verdict.SLEEPS,
        Call.SLEEP: Verdict.SLEEPS,
        Call.ABORT: Verdict.DONE,
    },
    Activity.CLOSING: {},
}
