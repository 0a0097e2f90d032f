"""Who has the engine: calls take it by the table of `aseer.runtime.activity`, or wait.

Everything here runs on the engine's event loop. A call looks at the table and takes the
engine in one step, with no `await` in between; a call that has to wait looks again
after every change, first come first served.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, overload

from aseer.errors import EngineError, RolloutInProgressError
from aseer.runtime.activity import TAKEN, Activity, Call, Verdict, decide

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.runtime.activity import Taking

# A rollout that has taken its groups without its reader so far may come to need that
# one at any moment, of which nothing tells.
_LOOK_INTERVAL_S = 0.5


class InTheWay(Protocol):
    """The rollout in progress, as far as other calls have to do with it."""

    def was_left(self, asker: object) -> bool:
        """Whether nobody will read on, as far as whoever asks can know."""
        ...

    def is_held_up_by(self, asker: object) -> bool:
        """Whether it cannot end while whoever asks waits."""
        ...

    def description(self) -> str:
        """The rollout in a few words, for an error."""
        ...

    async def end(self) -> None:
        """Stop the work of a rollout that was left; the rollout is over then."""
        ...

    async def abort(self) -> None:
        """End the rollout early, for its reader too; the rollout is over then."""
        ...


@dataclass(frozen=True)
class _Doing:
    """What has nothing to it but its name."""

    activity: Activity


@dataclass(frozen=True)
class _RollingOut:
    """A rollout is in progress, or was left."""

    rollout: InTheWay


@dataclass(frozen=True)
class _Closed:
    """The engine is closing, or closed."""

    error: Callable[[], EngineError]


class Claim:
    """The engine, as long as one call has it."""

    def __init__(self, claims: Claims, after: Activity) -> None:
        self._claims = claims
        self.after = after
        """What the engine does once this call has given it back."""

    def become(self, activity: Activity) -> None:
        """Go on to something else, without letting anybody in between."""
        self._claims._do(self, activity)

    def release(self) -> None:
        """Give the engine back. May be called again."""
        self._claims._release(self)


class Claims:
    """What the engine is doing, and the calls that wait for it to do something else."""

    def __init__(self) -> None:
        self._state: _Doing | _RollingOut | _Closed = _Doing(Activity.IDLE)
        self._holder: Claim | None = None
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def activity(self) -> Activity:
        """What the engine is doing."""
        match self._state:
            case _Doing(activity):
                return activity
            case _RollingOut():
                return Activity.ROLLING_OUT
            case _Closed():
                return Activity.CLOSING

    @overload
    async def take(self, call: Taking, asker: object = None) -> Claim: ...
    @overload
    async def take(self, call: Call, asker: object = None) -> Claim | None: ...
    async def take(self, call: Call, asker: object = None) -> Claim | None:
        """Take the engine for a call; None if nothing is to be done for it.

        Args:
            asker: the task or thread that calls, which knows whether it gave a rollout
                up, and may be its reader.

        Raises:
            RolloutInProgressError: a rollout is in progress, and the call does not wait
                for such, or would wait for what it holds up itself.
            EngineError: the engine is asleep, closed, or has failed.
        """
        while True:
            match decide(self._seen_by(asker), call), self._state:
                case Verdict.TAKE, _Doing(was):
                    is_half = was is Activity.HALF_AWAKE and call is not Call.WAKE
                    claim = Claim(self, was if is_half else Activity.IDLE)
                    self._holder = claim
                    self._do(claim, TAKEN[call])
                    return claim
                case Verdict.DONE, _:
                    return None
                case Verdict.WAIT, _:
                    await self._change(asker)
                case Verdict.END, _RollingOut(rollout):
                    await rollout.end()
                    if call is Call.ABORT:
                        return None
                case Verdict.ABORT, _RollingOut(rollout):
                    await rollout.abort()
                    if call is Call.ABORT:  # one that began since is not meant
                        return None
                case Verdict.BUSY, _RollingOut(rollout):
                    raise RolloutInProgressError(
                        f"a rollout {rollout.description()} is in progress; "
                        f"{_ADVICE.get(call.name, _ADVICE_OTHERWISE)}"
                    )
                case Verdict.SLEEPS, _Doing(what):
                    raise EngineError(f"the engine is {what}; wake() it first")
                case Verdict.CLOSED, _Closed(error):
                    raise error()
                case verdict, state:
                    raise AssertionError(f"the table says {verdict!r} of {state}")

    def set_rollout(self, rollout: InTheWay) -> None:
        """The rollout that the call which has the engine began."""
        if self.activity is Activity.BEGINNING:
            self._become(_RollingOut(rollout))

    def close(self, error: Callable[[], EngineError]) -> None:
        """Refuse every call from here on, those that wait included.

        Args:
            error: makes what they are refused with.
        """
        self._holder = None
        self._become(_Closed(error))

    def check_open(self) -> None:
        """See that the engine did not close since a call took it.

        Raises:
            EngineError: it did.
        """
        if isinstance(self._state, _Closed):
            raise self._state.error()

    def _seen_by(self, asker: object) -> Activity:
        state = self._state
        if isinstance(state, _RollingOut) and state.rollout.was_left(asker):
            return Activity.LEFT
        return self.activity

    def _do(self, claim: Claim, activity: Activity) -> None:
        if self._holder is claim:
            self._become(_Doing(activity))

    def _release(self, claim: Claim) -> None:
        if self._holder is claim:
            self._holder = None
            self._become(_Doing(claim.after))

    def _become(self, state: _Doing | _RollingOut | _Closed) -> None:
        self._state = state
        waiting, self._waiting = self._waiting, []
        for changed in waiting:
            if not changed.done():
                changed.set_result(None)

    def _check_can_end(self, asker: object) -> None:
        state = self._state
        if isinstance(state, _RollingOut) and state.rollout.is_held_up_by(asker):
            raise RolloutInProgressError(
                f"the rollout in progress, {state.rollout.description()}, takes "
                "further groups from its iterator only as it is read, and who reads it "
                "would wait for its end here, for ever; read it to its end first, or "
                "give pause='abort'"
            )

    async def _change(self, asker: object) -> None:
        """Wait until the engine does something else.

        Raises:
            RolloutInProgressError: it never will, while whoever asks waits.
        """
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(changed)
        try:
            while not changed.done():
                self._check_can_end(asker)
                await asyncio.wait([changed], timeout=_LOOK_INTERVAL_S)
        finally:
            if changed in self._waiting:  # the wait was broken off
                self._waiting.remove(changed)


_ADVICE = {
    "ROLLOUT": "an engine runs one at a time: iterate it to its end, or close it "
    "first (`async with engine.rollout(...) as rollout` does so, and "
    "Engine.abort_rollout ends whatever runs)",
    "UPDATE": "iterate it to its end first, or give pause='wait' or pause='abort'",
}
_ADVICE_OTHERWISE = "iterate it to its end first"
