"""Whatever of a cluster fails, at whatever moment: nothing is lost (I1, I11)."""

from __future__ import annotations

import os

import pytest

from tests.integration.chaos import Expected, run_seed, undisturbed
from tests.integration.chaos_settings import GANGS, SIMULATED, Outcome

pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(400)
SETTINGS = {"single": SIMULATED, "gangs": GANGS}


@pytest.fixture(scope="module")
def expected() -> Expected:
    return undisturbed(SIMULATED)  # the same of engines that span nodes


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 50))]
)
async def test_nothing_is_lost_doubled_changed_or_left_behind(seed, kind, expected):
    settings = SETTINGS[kind]
    if os.geteuid():
        settings = settings.without_mounts()
    outcome = Outcome()
    await run_seed(seed, settings, expected, outcome)
    assert outcome.num_bad == 0, outcome.notes
    assert outcome.num_updates >= outcome.num_rollouts > 0
    assert outcome.faults.total() == settings.num_events
