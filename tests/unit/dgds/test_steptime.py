"""The step-time model follows what it is told."""

from __future__ import annotations

import numpy as np
import pytest

from aseer.dgds.steptime import StepTimeModel


def roofline(rows: int, drafted: int, context: int) -> float:
    busy = max(40.0, 1.2 * (rows + drafted))
    return (busy + 3 * (drafted > 0) + 0.2 * drafted + context / 5000) / 1000


PROFILE = [(1, 8), (1, 0), (1, 3), (4, 0), (4, 16), (4, 48), (16, 0), (16, 240)]


def linear(rows: int, drafted: int) -> float:
    return 0.01 + 0.0006 * (rows + drafted)


def trained(noise: float = 0.0, num_steps: int = 3000) -> StepTimeModel:
    rng = np.random.default_rng(0)
    model = StepTimeModel()
    for _ in range(num_steps):
        rows = int(rng.integers(1, 100))
        drafted = int(rng.integers(0, 4)) * rows
        context = int(rng.integers(10, 500)) * rows
        step_s = roofline(rows, drafted, context) * rng.lognormal(0, noise)
        model.observe(rows, drafted, context, step_s)
    return model


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_learns_a_roofline_within_a_tenth(rows, noise):
    model = trained(noise)
    predicted = model.predict(rows, 2 * rows, 100 * rows)
    expected = [roofline(rows, d, 100 * rows) for d in range(2 * rows + 1)]
    assert predicted[::rows] == pytest.approx(expected[::rows], rel=0.1)


def test_predictions_never_fall_with_more_drafted_tokens():
    predicted = trained(noise=0.3, num_steps=200).predict(8, 64, 1000)
    assert (np.diff(predicted) >= 0).all()


def test_it_follows_an_engine_that_becomes_slower():
    model = trained()
    for _ in range(3000):
        model.observe(8, 8, 800, 0.1)
    assert model.predict(8, 8, 800)[8] == pytest.approx(0.1, rel=0.05)


def test_a_hiccup_is_not_believed():
    model = trained()
    before = model.predict(8, 8, 800)[0]
    model.observe(8, 0, 800, 100 * before)
    for _ in range(16):
        model.observe(8, 0, 800, before)
    assert model.predict(8, 8, 800)[0] == pytest.approx(before, rel=0.1)


def test_the_profile_is_not_forgotten():
    model = StepTimeModel()
    for _ in range(5):
        for rows in (1, 8, 64):
            model.observe(rows, 0, 0, 0.01 * rows, is_profile=True)
    for _ in range(5000):
        model.observe(8, 0, 0, 0.08)
    assert model.predict(64, 0, 0)[0] == pytest.approx(0.64, rel=0.1)


def test_it_predicts_nothing_before_it_has_seen_a_step():
    assert not StepTimeModel().predict(4, 3, 100).any()


def test_a_noisy_machine_is_not_taken_for_a_quicker_one():
    model = StepTimeModel()
    for i in range(2000):
        model.observe(4, 0, 400, 0.010 * (0.7 if i % 2 else 1.3))
    assert model.predict(4, 0, 400)[0] == pytest.approx(0.010, rel=0.05)


@pytest.mark.parametrize("seed", [104, 238, 310])
def test_a_slow_first_step_does_not_put_it_off_for_good(seed):
    # With these seeds some step is soon predicted to take no time at all.
    rng = np.random.default_rng(seed)
    model = StepTimeModel()
    model.observe(1, 0, 3, 0.3, is_profile=True)
    for rows, drafted in PROFILE * 3:
        step_s = linear(rows, drafted) * rng.lognormal(0, 0.25)
        model.observe(rows, drafted, 3 * rows, step_s, is_profile=True)
    rows = 31
    for length in range(600):
        if rng.random() < 0.03:
            rows = int(rng.integers(1, 18))
        drafted = 16 * int(rng.integers(1, 4)) if rng.random() < 0.1 else 0
        step_s = linear(rows, drafted) * rng.lognormal(0, 0.2)
        model.observe(rows, drafted, rows * (20 + length), step_s)
    for rows in (1, 2, 4, 8, 16):
        predicted = model.predict(rows, 0, 600 * rows)[0]
        assert predicted == pytest.approx(linear(rows, 0), rel=0.4)


def test_no_step_takes_less_than_half_of_the_fastest():
    predicted = trained(noise=0.3, num_steps=50).predict(1, 8, 0)
    assert (predicted > 0.01).all()


def launched(rows: int, drafted: int, jump_s: float, graphs: int = 512) -> float:
    """An 8B model's step on a GPU: by graphs, and beyond them kernel by kernel."""
    tokens = rows + drafted
    busy = max(8.0, 0.02 * tokens) + 0.4 * (drafted > 0)
    return busy / 1000 + jump_s * (tokens > graphs)


def trained_on_graphs(graph_tokens: int | None, jump_s: float) -> StepTimeModel:
    rng = np.random.default_rng(1)
    model = StepTimeModel(graph_tokens)
    for _ in range(4):
        for rows, each in ((1, 8), (64, 0), (56, 8), (64, 8)):
            step_s = launched(rows, each * rows, jump_s)
            model.observe(rows, each * rows, rows, step_s, is_profile=True)
    for _ in range(2000):
        rows = int(rng.integers(1, 255))
        drafted = int(rng.integers(0, 5)) * rows
        step_s = launched(rows, drafted, jump_s) * rng.lognormal(0, 0.05)
        model.observe(rows, drafted, 100 * rows, step_s)
    return model


@pytest.mark.parametrize("jump_s", [0.0, 0.004, 0.012])
def test_it_learns_where_steps_leave_the_graphs(jump_s):
    predicted = trained_on_graphs(512, jump_s).predict(100, 700, 10_000)
    expected = [launched(100, d, jump_s) for d in range(701)]
    assert predicted[1:] == pytest.approx(expected[1:], rel=0.1)
    # To a tenth of a step; f may bend elsewhere than the engine does.
    assert predicted[413] - predicted[412] == pytest.approx(jump_s, abs=1e-3)
    assert (np.diff(predicted) >= 0).all()


def test_a_line_with_bends_alone_does_not_tell_where_graphs_end():
    """What the term is for: without it steps behind the end seem cheaper than are."""
    predicted = trained_on_graphs(None, 0.012).predict(100, 700, 10_000)
    assert predicted[413] < 0.85 * launched(100, 413, 0.012)
    assert predicted[412] > 1.15 * launched(100, 412, 0.012)


def test_steps_that_all_replay_graphs_are_learned_as_without_the_term():
    with_end, without = StepTimeModel(512), StepTimeModel()
    rng = np.random.default_rng(2)
    for _ in range(500):
        rows = int(rng.integers(1, 100))
        drafted = int(rng.integers(0, 4)) * rows
        step_s = roofline(rows, drafted, 0) * rng.lognormal(0, 0.1)
        for model in (with_end, without):
            model.observe(rows, drafted, 0, step_s)
    for rows in (1, 30, 120):
        expected = without.predict(rows, 600, 1000)
        assert with_end.predict(rows, 600, 1000) == pytest.approx(expected, rel=1e-6)
