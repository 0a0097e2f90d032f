from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from aseer.transport.zeromq import make_socket_dir

if TYPE_CHECKING:
    import pytest

UUID = "ab6f74eb-6c49-4cfa-b9da-2400d9f5a04c"


def can_bind(folder: Path) -> bool:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(f"ipc://{folder}/{UUID}")
    return True


def test_sockets_are_where_temporary_files_go() -> None:
    folder = make_socket_dir()
    try:
        assert folder.parent == Path(tempfile.gettempdir())
        assert folder.stat().st_mode & 0o777 == 0o700
        assert can_bind(folder)
    finally:
        shutil.rmtree(folder)


def test_a_long_tmpdir_does_not_make_sockets_paths_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = make_socket_dir()
    try:
        assert can_bind(folder)
        assert not list(long.iterdir())
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        shutil.rmtree(folder)
