"""How large a model is, from what lies on this machine's disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.kv.room import checkpoint_bytes

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, **sizes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        (folder / name.replace("_", ".")).write_bytes(bytes(size))


def test_a_directorys_weights_are_counted_in_the_format_that_is_loaded(
    tmp_path: Path,
) -> None:
    write(tmp_path, a_safetensors=100, b_safetensors=11, a_bin=7, config_json=5)
    assert checkpoint_bytes(str(tmp_path)) == 111


def test_a_name_is_looked_for_in_the_cache_only(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    assert checkpoint_bytes("Org/Model", environ) is None
    write(tmp_path / "models--Org--Model" / "snapshots" / "abc", a_safetensors=42)
    assert checkpoint_bytes("Org/Model", environ) == 42


def test_what_has_no_weights_has_no_size(tmp_path: Path) -> None:
    write(tmp_path, config_json=5)
    assert checkpoint_bytes(str(tmp_path)) is None
