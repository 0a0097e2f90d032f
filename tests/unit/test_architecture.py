"""ARCHITECTURE.md names modules and tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
# `kv/pool.py` and `csrc/cst.h` as the page says them: below aseer/, or a part of it.
FOLDERS = ("", "aseer", "aseer/kv", "aseer/dgds", "aseer/instance", "tests/property")


def test_every_file_that_is_named_is_there():
    named = set(re.findall(r"`([\w./]+\.(?:py|cc|h|md|json))(?:::\w+)?`", TEXT))
    assert len(named) > 80
    missing = {n for n in named if not any((ROOT / f / n).exists() for f in FOLDERS)}
    assert not missing


def test_every_test_that_is_named_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), test
