"""A simulated engine for every test that asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import aseer
from tests.integration.sims import config_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def engine() -> AsyncIterator[aseer.Engine]:
    async with aseer.Engine(config_of()) as engine:
        yield engine
