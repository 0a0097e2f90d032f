"""Modules of aseer's that need vLLM or LMCache, imported with stand-ins for these."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pytest


def stand_in(
    monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, Mapping[str, Any]]
) -> dict[str, ModuleType]:
    """Have `import` find modules that have these names, as long as the test runs.

    Args:
        modules: names of each module; packages above it need not be given, and of
            aseer's are the real ones.
    """
    whole = {**{above: {} for name in modules for above in _above(name)}, **modules}
    made = {}
    for name in sorted(whole):
        made[name] = ModuleType(name)
        made[name].__path__ = []
        made[name].__dict__.update(whole[name])
        monkeypatch.setitem(sys.modules, name, made[name])
        package, _, leaf = name.rpartition(".")
        if package:
            above = made.get(package) or importlib.import_module(package)
            monkeypatch.setattr(above, leaf, made[name], raising=False)
    return made


def imported(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    modules: Mapping[str, Mapping[str, Any]],
    *,
    anew: Iterable[str] = (),
) -> ModuleType:
    """A module of aseer's, made anew with stand-ins; the next test finds it as it was.

    Args:
        modules: see `stand_in`.
        anew: further modules of aseer's that are to find the stand-ins.
    """
    stand_in(monkeypatch, modules)
    for each in (*anew, name):
        package, _, leaf = each.rpartition(".")
        monkeypatch.setattr(importlib.import_module(package), leaf, None, raising=False)
        monkeypatch.setitem(sys.modules, each, None)
        del sys.modules[each]
    return importlib.import_module(name)


def _above(name: str) -> list[str]:
    parts = [] if name.startswith("aseer.") else name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
