"""What each module may import: the rooms of the design, read off the syntax trees."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "aseer"

# The pure part: which modules of aseer each may import. What is not named here is an
# adapter, or joins adapters.
BASE = {
    "aseer.types",
    "aseer.errors",
    "aseer.config",
    "aseer.inputs.plain",
    "aseer.sampling",
}
CORE = {
    "aseer.types": set(),
    "aseer.errors": set(),
    "aseer.inputs.plain": {"aseer.errors"},
    "aseer.inputs.fields": {"aseer.errors", "aseer.inputs.plain"},
    "aseer.inputs.engine_args": {"aseer.errors"},
    "aseer.inputs.structured": {"aseer.errors", "aseer.inputs.plain"},
    "aseer.sampling": {"aseer.errors", "aseer.inputs.plain", "aseer.inputs.structured"},
    "aseer.config": BASE | {"aseer.inputs.engine_args", "aseer.inputs.fields"},
    "aseer.core.request": BASE | {"aseer.core.outputs"},
    "aseer.core.running": BASE | {"aseer.buffer"},
    "aseer.core.quarantine": BASE | {"aseer.core.request"},
    "aseer.core.commands": BASE,
    "aseer.core.counters": BASE | {"aseer.buffer"},
    "aseer.buffer": BASE
    | {"aseer.core.columns", "aseer.core.outputs", "aseer.core.request"},
    "aseer.core.columns": BASE,
    "aseer.core.outputs": BASE | {"aseer.core._native", "aseer.core.columns"},
    "aseer.transport.link": BASE,
    "aseer.context": BASE,
    "aseer.core.fleet": BASE | {"aseer.core._native"},
    "aseer.core.waiting": BASE | {"aseer.core._native"},
    "aseer.core.prompts": BASE,
    "aseer.policies": BASE | {"aseer.core.waiting"},
    "aseer.scheduler": BASE
    | {"aseer.policies"}
    | {"aseer.core.fleet", "aseer.core.prompts", "aseer.core.waiting"},
    "aseer.core.residency": BASE | {"aseer.core._native"},
    "aseer.kv.frees": BASE | {"aseer.kv.messages"},
    "aseer.kv.messages": BASE,
    "aseer.kv.settings": BASE,
    "aseer.kv.sharing": BASE,
    "aseer.dgds.log": BASE | {"aseer.dgds.messages"},
    "aseer.dgds.messages": BASE,
    "aseer.dgds.steptime": BASE,
    "aseer.dgds.calibration": BASE,
    "aseer.dgds.budget": BASE
    | {"aseer.dgds._cst", "aseer.dgds.calibration", "aseer.dgds.steptime"},
    "aseer.dgds.cst": BASE | {"aseer.dgds._cst"},
    "aseer.dgds.reference": BASE | {"aseer.dgds.cst"},
    "aseer.weights.names": BASE,
    "aseer.weights.checks": BASE | {"aseer.weights.names"},
    "aseer.weights.update": BASE,
    "aseer.runtime.calls": BASE
    | {"aseer.core.columns", "aseer.core.commands", "aseer.controller"},
    # It joins the core, and is as pure.
    "aseer.controller": BASE
    | {
        "aseer.buffer",
        "aseer.core.columns",
        "aseer.core.commands",
        "aseer.context",
        "aseer.core.counters",
        "aseer.core.fleet",
        "aseer.core.residency",
        "aseer.core.outputs",
        "aseer.policies",
        "aseer.core.quarantine",
        "aseer.core.running",
        "aseer.scheduler",
        "aseer.core.waiting",
    },
}
# No I/O, no concurrency; time and randomness are arguments.
NOT_IN_CORE = {
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
    "vllm": ("aseer.instance", "aseer.dgds", "aseer.kv", "aseer.cli"),
    "lmcache": ("aseer.kv",),
    "matplotlib": ("aseer.plot",),
}
# Slow to import or not always there: `import aseer` must work without.
HEAVY = ("vllm", "lmcache", "torch", "transformers", "matplotlib", "tokenizers", "gguf")


class Import(NamedTuple):
    """One name that a module imports."""

    target: str
    line: int
    at_run_time: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source: str) -> list[Import]:
    """Everything a module imports, wherever in it; ours as modules, not names."""
    tree = ast.parse(source)
    only_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
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
        at_run_time = id(node) not in only_types
        found += [
            Import(name, node.lineno, at_run_time) for name in dict.fromkeys(targets)
        ]
    return found


def is_in(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def violations(module: str, source: str) -> list[str]:
    """What a module imports and may not, each with its line."""
    found = []
    for target, line, at_run_time in imports_of(source):
        top = target.split(".")[0]
        if module in CORE and top == "aseer" and target not in CORE[module]:
            found.append(f"{module}:{line} imports {target}")
        if module in CORE and top in NOT_IN_CORE and at_run_time:
            found.append(f"{module}:{line} imports {target}, and is core")
        homes = HOMES.get(top)
        if homes and not any(is_in(module, home) for home in homes):
            found.append(f"{module}:{line} imports {target}, whose home is {homes}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_their_room_may(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aseer.buffer", "import asyncio"),
        ("aseer.buffer", "def f():\n    from time import monotonic"),
        ("aseer.buffer", "from aseer.context import ContextManager"),
        ("aseer.buffer", "from aseer import controller"),
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


def test_importing_aseer_imports_nothing_heavy() -> None:
    report = "import json, sys, aseer; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "aseer" in imported
    assert imported.isdisjoint(HEAVY)
