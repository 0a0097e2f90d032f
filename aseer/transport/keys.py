"""One secret for a cluster, and the keys that its connections are encrypted with.

Whoever has the secret derives both ends' key pairs. Neither public key is ever sent in
the clear, so that who lacks the secret cannot finish a handshake, in either direction.
The secret is looked for in this order, and the first that is there counts:

    a file that is named      EngineConfig(key_file=...), aseer node --key-file
    ASEER_KEY                 the secret itself
    ASEER_KEY_FILE            a file's path
    ~/.config/aseer/key       which `aseer key` makes
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from aseer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "ASEER_KEY"
FILE_VARIABLE = "ASEER_KEY_FILE"
# As random bytes go, what no one guesses; a shorter text is a password.
MIN_BYTES = 16
_NEW_BYTES = 32
_MAX_BYTES = 4096
HOW_TO = (
    "run `aseer key` once, which makes ~/.config/aseer/key, and copy that file to the "
    f"other hosts, or set {VARIABLE} or {FILE_VARIABLE} to the same on all"
)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Of one end; both in Z85, as ZeroMQ takes them."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """Of both ends."""

    controller: KeyPair
    node: KeyPair


def derive_keys(secret: bytes) -> Keys:
    """The keys that a secret stands for."""
    return Keys(_pair(secret, b"aseer-head"), _pair(secret, b"aseer-node"))


def new_keys() -> Keys:
    """Keys of a secret that nobody has."""
    return derive_keys(secrets.token_bytes(_NEW_BYTES))


def _pair(secret: bytes, who: bytes) -> KeyPair:
    key = z85.encode(hashlib.blake2b(secret, digest_size=32, person=who).digest())
    return KeyPair(zmq.curve_public(key), key)


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the key is if nothing says where it is."""
    home = environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(home) / "aseer" / "key"


def find_keys(
    key_file: str | None, environ: Mapping[str, str] = os.environ
) -> Keys | None:
    """The keys of this process's cluster; None if it has no secret.

    Args:
        key_file: looked at first; None = none is named.
    Raises:
        ConfigError: the secret is too short, or its file cannot be used.
    """
    if key_file is None and environ.get(VARIABLE):
        return derive_keys(_checked(environ[VARIABLE].encode(), VARIABLE))
    named = key_file or environ.get(FILE_VARIABLE)
    path = Path(named) if named else default_path(environ)
    if not named and not path.exists():
        return None
    return derive_keys(_checked(_read(path), str(path)))


def make_key_file(path: Path) -> None:
    """Write a new secret to a file that only this user can read.

    Raises:
        ConfigError: there is a file already, or it cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be made: {error}") from None
    with os.fdopen(file, "w") as key:
        key.write(secrets.token_hex(_NEW_BYTES) + "\n")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise ConfigError(
                    f"the key file {path} can be read by others (its mode is "
                    f"{stat.S_IMODE(mode):04o}); run `chmod 600 {path}`, or in "
                    "Kubernetes mount the Secret with defaultMode: 0400"
                )
            return file.read(_MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}") from None


def _checked(secret: bytes, where: str) -> bytes:
    secret = secret.strip()
    if len(secret) < MIN_BYTES:
        raise ConfigError(
            f"the key in {where} has {len(secret)} bytes; it needs at least "
            f"{MIN_BYTES}, which nobody can guess: `aseer key` makes one"
        )
    return secret
