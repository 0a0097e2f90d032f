"""What a check of the doctor's is, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
        advice: what to do, in one line; empty if there is nothing to do.
        seconds: the check took.
    """

    status: Status
    detail: str
    advice: str = ""
    seconds: float = 0.0

    def after(self, seconds: float) -> Finding:
        """The same finding, with the time it took."""
        return replace(self, seconds=round(seconds, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A check; it is skipped if one of those it needs did not pass."""

    name: str
    run: Callable[[], Finding]
    needs: tuple[str, ...] = ()


def ok(detail: str) -> Finding:
    """A finding without a fault."""
    return Finding(status="ok", detail=detail)


def warn(detail: str, advice: str) -> Finding:
    """A finding that costs something, and what to do."""
    return Finding(status="warn", detail=detail, advice=advice)


def fail(detail: str, advice: str) -> Finding:
    """A finding with which nothing runs, and what to do."""
    return Finding(status="fail", detail=detail, advice=advice)
