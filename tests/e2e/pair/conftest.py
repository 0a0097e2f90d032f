"""Two engines with the tiny model, which all tests of this folder share.

They take a minute to start on two cores. Each test leaves them with the tiny model's
weights, whatever it did to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import aseer
from tests.e2e.tiny import tiny_config

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def engine() -> Iterator[aseer.Engine]:
    args = {"worker_extension_cls": "tests.e2e.extension.Extension"}
    config = tiny_config(num_instances=2, chunk_size=32, engine_args=args)
    with aseer.Engine(config) as engine:
        yield engine
