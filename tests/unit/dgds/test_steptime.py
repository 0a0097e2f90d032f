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
