"""The list's rules: which steps are taken, in which order, and what ends them.

No step is known here. A step that raises has failed, whatever it raises, and what was
found before is kept: a report of half an hour is worth more than a traceback.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aseer.cli.findings import Finding, fail
from aseer.errors import AseerError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")

REPORT_IT = "report this, with first-hour.json"


class Seen(NamedTuple):
    """What a step measured, and what is to be thought of it.

    Attributes:
        figures: a dataclass, or plain data; None = nothing was measured.
    """

    finding: Finding
    figures: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A thing to see, and how.

    Attributes:
        name: one word, by which a user names it.
        about: what is seen, in a line.
        see: may take minutes, and may raise.
        skip: why it cannot be seen here; "" = it can.
    """

    name: str
    about: str
    see: Callable[[], Seen]
    skip: str = ""


class Outcome(NamedTuple):
    """What a step found."""

    name: str
    finding: Finding
    figures: Any = None


def step(
    name: str,
    about: str,
    measure: Callable[[], _T],
    judge: Callable[[_T], Finding],
    *,
    skip: str = "",
) -> Step:
    """A step that measures, and judges what it measured."""

    def see() -> Seen:
        figures = measure()
        return Seen(judge(figures), figures)

    return Step(name=name, about=about, see=see, skip=skip)


def choose(
    steps: Sequence[Step], names: Sequence[str] = (), first: str | None = None
) -> list[Step]:
    """Those of the steps that are wanted, in their own order.

    Args:
        names: of the wanted ones; empty = all.
        first: name of the one to begin with; None = the first.
    Raises:
        ConfigError: there is no step of a name.
    """
    known = [each.name for each in steps]
    for name in (*names, *([] if first is None else [first])):
        if name not in known:
            raise ConfigError(
                f"there is no step {name!r}; the steps are {', '.join(known)}"
            )
    start = 0 if first is None else known.index(first)
    return [each for each in steps[start:] if not names or each.name in names]


def before(steps: Sequence[Step], first: str | None) -> list[str]:
    """Names of the steps that come before one; of none, none do."""
    names = [each.name for each in steps]
    return [] if first is None else names[: names.index(first)]


def run_steps(
    steps: Sequence[Step],
    tell: Callable[[Outcome], None],
    during: Callable[[Step], AbstractContextManager[object]] = nullcontext,
) -> list[Outcome]:
    """Run steps up to the first that fails; the rest are skipped.

    Args:
        tell: is given each outcome as soon as it is known.
        during: what is entered while a step runs.
    """
    outcomes: list[Outcome] = []
    failed = ""
    for each in steps:
        started = time.monotonic()
        if failed:
            seen = Seen(Finding(status="skip", detail=f"after {failed} failed"))
        elif each.skip:
            seen = Seen(Finding(status="skip", detail=each.skip))
        else:
            with during(each):
                seen = _see(each)
        finding = seen.finding.after(time.monotonic() - started)
        failed = failed or (each.name if finding.status == "fail" else "")
        outcomes.append(Outcome(each.name, finding, seen.figures))
        tell(outcomes[-1])
    return outcomes


def is_ok(outcomes: Sequence[Outcome]) -> bool:
    """Whether no step failed."""
    return all(outcome.finding.status != "fail" for outcome in outcomes)


def _see(each: Step) -> Seen:
    try:
        return each.see()
    except AseerError as error:
        advice = "mend what it says, then go on with --from " + each.name
        return Seen(fail(str(error), advice))
    except Exception as error:  # a user has one report, whatever happens
        return Seen(fail(f"{type(error).__name__}: {error}", REPORT_IT))
