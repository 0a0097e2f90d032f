"""Which modules no unit or property test imports: a kept list, with reasons.

A module counts as imported if a test does so, by a statement or by its name (for
`importlib`), or a module that counts does so at its top. What another test puts in a
module's place is no import of it.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from tests.unit.test_imports import MODULES, ROOT, imports_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Calls that import what they are given by name.
IMPORTING = {"Lazy", "import_module", "imported", "importorskip"}

# Where each that is imported by none is tested, or why it need not be. The list may
# get shorter. What needs vLLM's own classes to mean anything is tested with them.
NOT_IMPORTED = {
    "aseer.__main__": "one call of aseer.cli.main, which is tested",
    "aseer.node.base": "protocols, which only types import",
    "aseer.dgds.client": "tests/integration/test_draft_server.py",
    "aseer.dgds.sampler": "tests/integration/test_sampler_verdict.py",
    "aseer.dgds.sampler_v2": "tests/e2e/test_v2_drafts.py",
    "aseer.dgds.speculator": "tests/integration/test_speculator.py",
    "aseer.dgds.verifier": "tests/e2e/test_speculation.py",
    "aseer.dgds.verifier_v2": "tests/e2e/test_v2_drafts.py",
    "aseer.instance.vllm.backend": "tests/integration/test_vllm_start.py",
    "aseer.instance.vllm.joining": "tests/integration/test_kv_joining.py",
    "aseer.instance.vllm.kvgroups": "tests/integration/test_kvgroups.py",
    "aseer.instance.vllm.limits": "tests/integration/test_v2_plan.py",
    "aseer.instance.vllm.packing": "called by patches, whose tests find it needed",
    "aseer.instance.vllm.patches": "tests/integration/test_patches.py",
    "aseer.instance.vllm.reload": "tests/integration/test_reload.py",
    "aseer.instance.vllm.sinks": "tests/integration/test_sinks.py",
    "aseer.instance.vllm.speculation": "tests/integration/test_v2_plan.py",
    "aseer.instance.vllm.stats": "tests/integration/test_kv_pool.py",
    "aseer.instance.vllm.text": "tests/e2e/test_text.py",
    "aseer.instance.vllm.transfer": "tests/integration/test_vllm_receivers.py",
    "aseer.instance.vllm.weights": "tests/integration/test_vllm_weights.py",
    "aseer.instance.vllm.worker": "tests/integration/test_vllm_start.py",
}


def imports_at_top(source: str) -> Iterator[str]:
    """What is imported when a module is."""
    statements = ast.parse(source).body
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (found.target for found in imports_of(ast.unparse(node)))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            statements += node.orelse
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody", "handlers"):
                statements += getattr(node, part, [])
        elif isinstance(node, ast.ExceptHandler):
            statements += node.body


def named_in(source: str) -> Iterator[str]:
    """What a test imports, anywhere in it: by a statement, a constant, or a call."""
    yield from (found.target for found in imports_of(source) if found.at_run_time)
    for node in ast.walk(ast.parse(source)):
        values: list[ast.expr] = []
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
            values = [node.value]
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func).rpartition(".")[2] in IMPORTING:
                values = node.args
        yield from texts_of(values)


def stood_in_for(source: str) -> Iterator[str]:
    """Modules that a test has a stand-in for, by the keys of its dicts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            yield from texts_of(node.keys)


def texts_of(values: Iterable[ast.expr | None]) -> Iterator[str]:
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def reached(source: str, imports: dict[str, set[str]]) -> set[str]:
    """Our modules that a test's imports bring along, their packages included."""
    found: set[str] = set()
    others = {*stood_in_for(source)}
    todo = [name for name in named_in(source) if name in imports]
    while todo:
        name = todo.pop()
        if name not in found and name not in others:
            found.add(name)
            todo += imports[name]
            todo += [name.rpartition(".")[0]] if "." in name else []
    return found


def test_the_modules_that_no_unit_or_property_test_imports_are_those_of_the_list():
    imports = {
        name: set(imports_at_top(path.read_text())) & {*MODULES}
        for name, path in MODULES.items()
    }
    missing = {*MODULES}
    for folder in ("unit", "property"):
        for path in (ROOT / "tests" / folder).rglob("*.py"):
            missing -= reached(path.read_text(), imports)
    assert missing - {*NOT_IMPORTED} == set(), "test them, or say why there is no test"
    assert {*NOT_IMPORTED} - missing == set(), "take them off the list"


def test_the_tests_that_the_list_names_are_of_those_modules():
    for module, where in NOT_IMPORTED.items():
        if where.startswith("tests/"):
            text = (ROOT / where).read_text()
            package, _, leaf = module.rpartition(".")
            # Also in code that the test has another process run.
            assert re.search(
                rf"{re.escape(module)}\b|from {re.escape(package)} import .*\b{leaf}\b",
                text,
            ), module


def test_imports_are_found_where_they_are_made():
    source = (
        "import a\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import b\n"
        "try:\n    import c\nexcept ImportError:\n    import d\n"
        "def f():\n    import e\nNAME = 'f'\nLazy('g')\nother = 'h'\nx({'g': 1})\n"
    )
    assert {*imports_at_top(source)} == {"a", "typing", "c", "d"}
    assert {*named_in(source)} == {"a", "typing", "c", "d", "e", "f", "g"}
    graph = {"a": {"a.b"}, "a.b": {"g.i"}, "g.i": set(), "g": {"j"}, "h": set()}
    assert reached(source, graph | {"j": set()}) == {"a", "a.b", "g.i"}
