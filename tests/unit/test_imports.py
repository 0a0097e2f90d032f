"""What each module may import: the rooms of the design, read off the syntax trees."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import aseer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "aseer"

# Rooms from the ground up. A module imports from its own room and from those below it,
# also for types only; which room it is in is said by the longest name that fits. The
# controller's half and the engine process's half meet in `instance.messages` alone.
ROOMS = (
    ("errors", "version", "compat", "watch", "cli.findings"),
    ("inputs",),
    ("counts", "sampling", "config", "types", "report", "data"),
    ("groups", "inputs.prompt", "inputs.tokenizer", "models", "display", "plot"),
    # The decisions: pure.
    ("core.columns", "core.commands", "core.outputs", "core.prompts", "core._native"),
    ("core.request",),
    ("context", "core.fleet", "core.residency", "core.waiting", "core.quarantine"),
    ("buffer", "policies"),
    ("core.counters", "core.running"),
    ("scheduler",),
    ("dispatcher",),
    ("controller",),
    # Messages, processes, and what is moved between them.
    ("transport",),
    ("dgds",),
    ("node",),
    ("journal",),
    ("weights",),
    ("kv",),
    # What runs in an engine's process.
    ("instance.base", "instance.messages", "instance.sim"),
    ("instance.vllm",),
    ("instance.main",),
    ("instance.vllm.replay",),
    # What runs in the user's.
    ("runtime",),
    ("",),  # aseer itself: the names that are public
    ("sim", "integrations", "server"),
    ("cli",),
    ("__main__",),
)
# All that decides, and what it stands on: no I/O, no concurrency; time and randomness
# are arguments.
PURE = (
    "counts",
    "types",
    "errors",
    "inputs.plain",
    "inputs.prompt_image",
    "inputs.fields",
    "inputs.sampling",
    "inputs.settings",
    "inputs.engine_args",
    "inputs.nodes",
    "inputs.calls",
    "inputs.structured",
    "inputs.kv_pool",
    "inputs.speculation",
    "sampling",
    "config",
    "core",
    "context",
    "buffer",
    "policies",
    "scheduler",
    "dispatcher",
    "controller",
    "transport.link",
    "node.chain",
    "journal.frames",
    "journal.records",
    "journal.history",
    "journal.keys",
    "journal.ledger",
    "kv.frees",
    "kv.images",
    "kv.messages",
    "kv.prefetches",
    "kv.settings",
    "kv.sharing",
    "dgds.log",
    "dgds.messages",
    "dgds.steptime",
    "dgds.calibration",
    "dgds.budget",
    "dgds.cst",
    "dgds.reference",
    "weights.names",
    "weights.checks",
    "weights.update",
    "server.wire",
    "runtime.activity",
    "runtime.calls",
    "runtime.restarts",
    "runtime.seats",
)
NOT_IN_PURE = {
    "asyncio",
    "concurrent",
    "multiprocessing",
    "os",
    "random",
    "secrets",
    "selectors",
    "socket",
    "subprocess",
    "threading",
    "time",
    "torch",
    "transformers",
    "uvloop",
    "vllm",
    "zmq",
}
# Libraries with one home each: the only folders or modules that import them.
HOMES = {
    "zmq": ("aseer.transport",),
    "vllm": (
        "aseer.instance.vllm",
        "aseer.dgds",
        "aseer.kv",
        "aseer.cli",
        "aseer.weights.carriers",  # the trainer's half of a transfer
    ),
    "lmcache": ("aseer.kv",),
    "matplotlib": ("aseer.plot",),
    "prometheus_client": ("aseer.node.metrics",),
    "aiohttp": ("aseer.server", "aseer.cli.serve"),
    "ray": ("aseer.integrations",),
}
# Slow to import or not always there: `import aseer` must work without.
HEAVY = (
    *("vllm", "lmcache", "torch", "transformers", "matplotlib", "tokenizers", "gguf"),
    *("prometheus_client", "ray"),
)


class Import(NamedTuple):
    """One name that a module imports."""

    target: str
    line: int
    at_run_time: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def statements_of(
    nodes: list[ast.AST], *, at_run_time: bool = True
) -> Iterator[tuple[ast.AST, bool]]:
    """Every statement, however deep, and whether it is for more than types."""
    for node in nodes:
        yield node, at_run_time
        only_types = isinstance(node, ast.If) and (
            ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        )
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from statements_of(
                getattr(node, field, []),
                at_run_time=at_run_time and not (only_types and field == "body"),
            )


@cache
def imports_of(source: str) -> list[Import]:
    """Everything a module imports, wherever in it; ours as modules, not names."""
    found = []
    for node, at_run_time in statements_of([ast.parse(source)]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            base = node.module or ""
            # `from aseer.dgds import budget` imports a module, not a name of one.
            targets = [
                whole if (whole := f"{base}.{alias.name}") in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        found += [
            Import(name, node.lineno, at_run_time) for name in dict.fromkeys(targets)
        ]
    return found


def is_in(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def room_of(module: str) -> int:
    """How high a module of aseer stands."""
    fitting = [
        (len(name), floor)
        for floor, room in enumerate(ROOMS)
        for name in room
        if (name and is_in(module, f"aseer.{name}")) or (not name and module == "aseer")
    ]
    assert fitting, f"{module} has no place in ROOMS"
    return max(fitting)[1]


def violations(module: str, source: str) -> list[str]:
    """What a module imports and may not, each with its line."""
    found = []
    is_pure = any(is_in(module, f"aseer.{name}") for name in PURE)
    for target, line, at_run_time in imports_of(source):
        top = target.split(".")[0]
        if top == "aseer" and room_of(target) > room_of(module):
            found.append(f"{module}:{line} imports {target}, which is above it")
        if is_pure and top in NOT_IN_PURE and at_run_time:
            found.append(f"{module}:{line} imports {target}, and is pure")
        homes = HOMES.get(top)
        if homes and not any(is_in(module, home) for home in homes):
            found.append(f"{module}:{line} imports {target}, whose home is {homes}")
    return found


def test_modules_import_only_what_their_room_may() -> None:
    found = [violations(module, path.read_text()) for module, path in MODULES.items()]
    assert list(chain.from_iterable(found)) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {
            found.target
            for found in imports_of(path.read_text())
            if found.at_run_time and found.target in MODULES and found.target != module
        }
        for module, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()


def test_no_packages_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        package = package_of(module)
        targets = {package_of(found.target) for found in imports_of(path.read_text())}
        graph.setdefault(package, set()).update(targets - {package, ""})
    TopologicalSorter(graph).prepare()


def package_of(module: str) -> str:
    """The folder in `aseer` that a module is in; "" if it is in none."""
    parts = module.split(".")
    is_there = len(parts) > 1 and parts[0] == "aseer" and (PACKAGE / parts[1]).is_dir()
    return parts[1] if is_there else ""


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aseer.buffer", "import asyncio"),
        ("aseer.buffer", "def f():\n    from time import monotonic"),
        ("aseer.context", "from aseer.buffer import RequestBuffer"),
        ("aseer.buffer", "from aseer import controller"),
        ("aseer.core.fleet", "from aseer.scheduler import Scheduler"),
        ("aseer.node.children", "from aseer.instance.vllm import backend"),
        ("aseer.kv.pool", "if TYPE_CHECKING:\n    import aseer.runtime.host"),
        ("aseer.instance.vllm.worker", "from aseer.runtime.launch import Launch"),
        ("aseer.dgds.budget", "import uvloop"),
        ("aseer.runtime.host", "import zmq"),
        ("aseer.runtime.host", "if TYPE_CHECKING:\n    import vllm"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aseer.scheduler", "from aseer.core.fleet import Fleet\nimport heapq"),
        ("aseer.buffer", "if TYPE_CHECKING:\n    from random import Random"),
        ("aseer.runtime.host", "import asyncio, time"),
        ("aseer.transport.zeromq", "import zmq.asyncio"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


def imported_by(statement: str) -> set[str]:
    """The modules that a new interpreter has after a statement."""
    report = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_all_of_aseer_imports_nothing_heavy() -> None:
    imported = imported_by("from aseer import *")
    assert "aseer.runtime.engine" in imported
    assert {name.split(".")[0] for name in imported}.isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["instance.main", "node.janitor"])
def test_a_process_of_an_engine_imports_nothing_of_the_users(module: str) -> None:
    """Engines start a few of each; every import is in the time that a start takes."""
    imported = imported_by(f"import aseer.{module}")
    assert f"aseer.{module}" in imported
    assert not [
        name
        for name in imported
        if name.startswith(("aseer.runtime", "aseer.controller", "aseer.scheduler"))
    ]


# Every process of a parallel run collects all tests, and imports their modules.
SLOW = "lmcache|peft|safetensors.torch|torch|transformers|trl|vllm"
IMPORTS_SLOW = re.compile(
    rf"""^(?:import |from |(?:\w+ = )?pytest\.importorskip\(")(?:{SLOW})\b.*""", re.M
)


def test_collecting_unit_and_property_tests_imports_nothing_slow() -> None:
    assert IMPORTS_SLOW.search('import os\ntorch = pytest.importorskip("torch")')
    assert IMPORTS_SLOW.search("from vllm.config import VllmConfig")
    found = {
        str(path.relative_to(ROOT)): lines
        for folder in ("unit", "property")
        for path in (ROOT / "tests" / folder).rglob("*.py")
        if (lines := IMPORTS_SLOW.findall(path.read_text()))
    }
    assert found == {}, "take them from tests/lazy.py, or import them in a function"


def test_modules_with_public_names_are_there_without_an_import_of_their_own() -> None:
    needed = "import aseer\naseer.report.KvReport, aseer.types.InstanceInfo"
    assert "aseer.report" in imported_by(needed)


def test_every_public_name_is_found_and_no_other() -> None:
    assert all(hasattr(aseer, name) for name in aseer.__all__)
    assert set(aseer.__all__) <= set(dir(aseer))
    with pytest.raises(AttributeError, match="has no attribute 'Engin'"):
        getattr(aseer, "Engin")  # noqa: B009 - a checker sees that it is not there
