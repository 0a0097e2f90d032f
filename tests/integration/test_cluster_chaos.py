"""Whatever of a cluster fails, at whatever moment: nothing is lost (I1, I11)."""

from __future__ import annotations

import os

import pytest

from tests.integration.chaos import run_seed, undisturbed
from tests.integration.chaos_settings import SIMULATED, Outcome

pytestmark = pytest.mark.timeout(400)
SETTINGS = SIMULATED.without_disk() if os.geteuid() else SIMULATED


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    return undisturbed(SETTINGS)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 50))]
)
async def test_nothing_is_lost_doubled_changed_or_left_behind(seed, expected):
    outcome = Outcome()
    await run_seed(seed, SETTINGS, expected, outcome)
    assert outcome.num_bad == 0, outcome.notes
    assert outcome.num_rollouts > 0
    assert outcome.faults.total() == SETTINGS.num_events
