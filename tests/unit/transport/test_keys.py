"""A cluster's secret: where it is looked for, what is refused, what it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aseer.cli.main import main
from aseer.errors import ConfigError
from aseer.transport.keys import derive_keys, find_keys, make_key_file

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "0123456789abcdef"


def key_file(path: Path, secret: str = SECRET, mode: int = 0o600) -> str:
    path.write_text(secret)
    path.chmod(mode)
    return str(path)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment without a key."""
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_a_secret_gives_each_end_keys_of_its_own_and_another_gives_others() -> None:
    keys, others = derive_keys(b"a" * 16), derive_keys(b"b" * 16)
    assert derive_keys(b"a" * 16) == keys
    pairs = [keys.controller, keys.node, others.controller, others.node]
    assert len({p.public for p in pairs} | {p.secret for p in pairs}) == 8


def test_what_is_named_goes_before_the_environment_and_that_before_the_home(
    tmp_path: Path, home: dict[str, str]
) -> None:
    assert find_keys(None, home) is None
    default = tmp_path / "config" / "aseer" / "key"
    default.parent.mkdir(parents=True)
    key_file(default, "in the home directory")
    file = {"ASEER_KEY_FILE": key_file(tmp_path / "file", "in the file, named so")}
    variable = {"ASEER_KEY": "in the variable!"}
    named = key_file(tmp_path / "named", "in the setting's file")
    found = [
        find_keys(None, home),
        find_keys(None, home | file),
        find_keys(None, home | file | variable),
        find_keys(named, home | file | variable),
    ]
    assert found == [
        derive_keys(b"in the home directory"),
        derive_keys(b"in the file, named so"),
        derive_keys(b"in the variable!"),
        derive_keys(b"in the setting's file"),
    ]


def test_line_ends_do_not_count(tmp_path: Path) -> None:
    file = key_file(tmp_path / "key", SECRET + "\r\n")
    assert find_keys(file) == derive_keys(SECRET.encode())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    file = key_file(tmp_path / "key", mode=mode)
    with pytest.raises(ConfigError, match=rf"{mode:04o}.*chmod 600 {file}"):
        find_keys(file)


def test_a_short_secret_is_refused_wherever_it_is(
    tmp_path: Path, home: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="ASEER_KEY has 5 bytes; it needs at least"):
        find_keys(None, home | {"ASEER_KEY": "short"})
    with pytest.raises(ConfigError, match="has 0 bytes"):
        find_keys(key_file(tmp_path / "key", "   \n"))


def test_a_file_that_is_named_must_be_there(home: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/key cannot be read"):
        find_keys(None, home | {"ASEER_KEY_FILE": "/nowhere/key"})


def test_the_command_makes_a_key_once_and_then_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "below" / "key"
    assert main(["key", str(path)]) == 0
    secret = path.read_text()
    assert main(["key", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n" * 2
    assert path.read_text() == secret
    assert (path.stat().st_mode & 0o777, len(secret.strip())) == (0o600, 64)
    with pytest.raises(ConfigError, match="cannot be made"):
        make_key_file(path)


def test_the_command_refuses_a_key_that_others_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key", key_file(tmp_path / "key", mode=0o644)]) == 1
    assert "chmod 600" in capsys.readouterr().err
