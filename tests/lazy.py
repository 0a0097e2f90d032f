"""Libraries that only some tests use, imported when the first of these tests runs.

Every process of a parallel run collects all tests: what a test module imports at its
top is paid for in each of them, also where none of the module's tests run.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pytest


class Lazy:
    """A library whose first use imports it, or skips the test if it is not there.

    The top of a test module, and arguments of `parametrize`, must not use it: they run
    while tests are collected.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _module(self) -> Any:
        return pytest.importorskip(self._name)

    def __getattr__(self, attribute: str) -> Any:
        # While pytest collects, it asks all objects for `_mock_name` and `__test__`.
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(self._module, attribute)
