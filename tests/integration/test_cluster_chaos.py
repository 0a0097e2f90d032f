"""Whatever of a cluster fails, at whatever moment: nothing is lost (I1, I11)."""

from __future__ import annotations

import os

import pytest

from tests.integration.chaos import Expected, run_seed, undisturbed
from tests.integration.chaos_settings import GANGS, POOLS, SIMULATED, Outcome

pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(400)
SETTINGS = {"single": SIMULATED, "gangs": GANGS, "pools": POOLS}


@pytest.fixture(scope="module")
def expected() -> Expected:
    return undisturbed(SIMULATED)  # the same of engines that span nodes


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, i, marks=[pytest.mark.slow] if i or kind == "pools" else [])
        for kind in SETTINGS
        for i in range(50)
    ],
)
async def test_nothing_is_lost_doubled_changed_or_left_behind(kind, seed, expected):
    settings = SETTINGS[kind]
    if settings.pools:
        pytest.importorskip("lmcache")
    if os.geteuid():
        settings = settings.without_mounts()
    outcome = Outcome()
    await run_seed(seed, settings, expected, outcome)
    assert outcome.num_bad == 0, outcome.notes
    assert outcome.num_updates >= outcome.num_rollouts > 0
    assert outcome.faults.total() == settings.num_events
