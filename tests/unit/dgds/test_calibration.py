import numpy as np
import pytest

from aseer.dgds.calibration import Calibration


def test_confidences_are_calibrated_by_what_was_accepted():
    calibration = Calibration()
    said = np.full(100, 0.8, np.float32)
    for _ in range(20):
        calibration.learn(said, np.arange(100) < 30)
    assert calibration.survivals(said[:1])[0] == pytest.approx(0.3, abs=0.02)


def test_calibration_starts_from_belief_and_never_falls_with_confidence():
    calibration = Calibration()
    grid = np.linspace(0, 1, 101).astype(np.float32)
    assert calibration.survivals(grid) == pytest.approx(grid, abs=0.01)
    rng = np.random.default_rng(1)
    for _ in range(50):
        said = rng.random(64).astype(np.float32)
        calibration.learn(said, rng.random(64) < said**3)
    survivals = calibration.survivals(grid)
    assert (np.diff(survivals) >= 0).all()
    assert survivals[70] == pytest.approx(0.7**3, abs=0.1)
