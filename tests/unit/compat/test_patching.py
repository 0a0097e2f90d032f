"""Patches are applied at their moment, and those that changed something are logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aseer.compat.patching import Patch, apply_patches

if TYPE_CHECKING:
    import pytest

LOG = logging.getLogger("aseer.test")


def change(target: list[str]) -> bool:
    target.append("changed")
    return True


def find_nothing(target: list[str]) -> bool:
    return False


def change_later(target: list[str]) -> bool:
    raise AssertionError("another moment")


PATCHES = (
    Patch(change, "start", "it hangs", "1.0"),
    Patch(find_nothing, "start", "it falls", "1.0"),
    Patch(change_later, "end", "it burns", "1.0"),
)


def test_only_what_changed_something_is_logged_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target: list[str] = []
    with caplog.at_level(logging.INFO, "aseer.test"):
        assert apply_patches(PATCHES, "start", LOG, target) == ["change"]
    assert target == ["changed"]
    assert caplog.messages == ["patched (change): it hangs"]
