"""The list's rules: which steps, in which order, and what ends them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from aseer.cli.findings import Finding, Status, fail, ok
from aseer.cli.hour.steps import Outcome, Seen, Step, choose, is_ok, run_steps, step
from aseer.errors import AseerError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


def seen(name: str, status: Status) -> Step:
    finding = Finding(status=status, detail=f"{name} was seen")
    return Step(name=name, about=name, see=lambda: Seen(finding))


def raising(error: Exception) -> Step:
    def see() -> Seen:
        raise error

    return Step(name="b", about="", see=see)


def forbidden(name: str, skip: str = "") -> Step:
    def see() -> Seen:
        raise AssertionError("must not run")

    return Step(name=name, about="", see=see, skip=skip)


def test_the_first_failure_ends_it_and_the_rest_is_not_run() -> None:
    told: list[Outcome] = []
    steps = [seen("a", "ok"), seen("b", "skip"), seen("w", "warn"), seen("c", "fail")]
    outcomes = run_steps(
        [*steps, forbidden("d"), forbidden("e", "no GPU")], told.append
    )
    assert told == outcomes
    assert [(o.name, o.finding.status) for o in outcomes] == [
        ("a", "ok"),
        ("b", "skip"),
        ("w", "warn"),
        ("c", "fail"),
        ("d", "skip"),
        ("e", "skip"),
    ]
    assert outcomes[-1].finding.detail == "after c failed"
    assert not is_ok(outcomes)
    assert is_ok(outcomes[:3]), "what warns or is skipped has not failed"


def test_what_cannot_be_seen_here_is_skipped_with_the_reason() -> None:
    (outcome,) = run_steps([forbidden("a", "it takes a GPU")], lambda _: None)
    assert outcome.finding.status == "skip"
    assert outcome.finding.detail == "it takes a GPU"


def test_an_error_of_ours_is_a_failure_that_says_where_to_go_on() -> None:
    outcomes = run_steps(
        [raising(AseerError("no memory")), forbidden("c")], lambda _: 0
    )
    assert outcomes[0].finding.status == "fail"
    assert outcomes[0].finding.detail == "no memory"
    assert outcomes[0].finding.advice.endswith("--from b")
    assert outcomes[1].finding.detail == "after b failed"


def test_any_other_error_is_a_failure_to_report() -> None:
    (outcome,) = run_steps([raising(KeyError("x"))], lambda _: None)
    assert outcome.finding.status == "fail"
    assert outcome.finding.detail == "KeyError: 'x'"
    assert "report this" in outcome.finding.advice


def test_an_interrupt_is_no_finding() -> None:
    def see() -> Seen:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_steps([Step(name="a", about="", see=see)], lambda _: None)


def test_a_step_keeps_its_figures_also_where_it_fails() -> None:
    def judge(figure: int) -> Finding:
        return ok("much") if figure > 3 else fail("little", "more")

    steps = [step("a", "", lambda: 4, judge), step("b", "", lambda: 2, judge)]
    outcomes = run_steps(steps, lambda _: None)
    assert [(o.figures, o.finding.status) for o in outcomes] == [(4, "ok"), (2, "fail")]


def test_only_a_step_that_runs_is_shown_as_running() -> None:
    shown: list[str] = []

    @contextmanager
    def during(each: Step) -> Iterator[None]:
        shown.append(each.name)
        yield

    steps = [seen("a", "ok"), forbidden("b", "no"), seen("c", "fail"), forbidden("d")]
    run_steps(steps, lambda _: None, during)
    assert shown == ["a", "c"]


STEPS = [seen(name, "ok") for name in "abcd"]


@pytest.mark.parametrize(
    ("names", "first", "chosen"),
    [
        ((), None, "abcd"),
        (("d", "b"), None, "bd"),
        ((), "c", "cd"),
        (("a", "d"), "b", "d"),
    ],
)
def test_steps_are_chosen_by_name_and_stay_in_order(names, first, chosen) -> None:
    assert "".join(each.name for each in choose(STEPS, names, first)) == chosen


@pytest.mark.parametrize(("names", "first"), [(("a", "x"), None), ((), "x")])
def test_an_unknown_step_is_refused_with_those_that_there_are(names, first) -> None:
    with pytest.raises(ConfigError, match="no step 'x'; the steps are a, b, c, d"):
        choose(STEPS, names, first)
