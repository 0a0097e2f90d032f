"""Fields of settings: checked, and kept as plain data under the same name.

A field that is refused raises a `ConfigError` that says what was given and what is
allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aseer.errors import ConfigError
from aseer.inputs.plain import (
    INT32_MAX,
    as_float,
    as_int,
    as_list,
    as_text,
    can_be_sent,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

# As good as for ever, and what clocks and timers of all kinds can count.
_MAX_SECONDS = 1e9
MAX_PORT = 65_535

Settings = TypeVar("Settings")


def refusal(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name}={value!r:.300} is not allowed; give {allowed}")


def set_field(config: object, name: str, value: object) -> None:
    """Keep what a setting means as plain data."""
    object.__setattr__(config, name, value)


def check_int(
    config: object,
    name: str,
    low: int,
    high: int = INT32_MAX,
    *,
    optional: bool = False,
) -> None:
    value = getattr(config, name)
    if value is None and optional:
        return
    number = as_int(value)
    rest = ", or None for the default" if optional else ""
    if number is None or number < low:
        raise refusal(name, value, f"an int >= {low}{rest}")
    if number > high:
        raise refusal(name, value, f"an int <= {high}{rest}")
    set_field(config, name, number)


def one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    """The word among `allowed` that was given; YAML reads a bare `off` as False."""
    text = "off" if value is False and "off" in allowed else as_text(value)
    if text is None or text not in allowed:
        raise refusal(name, value, f"one of {', '.join(allowed)}")
    return text


def settings_of(cls: type[Settings], name: str, given: Any, short: str) -> Settings:
    """Settings that are given as such, as a mapping of their fields (as a YAML file has
    them), or by the value of their field `short` alone.

    Raises:
        ConfigError: a key is no field, or a value is not allowed.
    """
    if isinstance(given, cls):
        return given
    if not isinstance(given, Mapping):
        return cls(**{short: given})
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise refusal(f"{name}'s key", key, f"some of {', '.join(known)}")
    return cls(**{str(key): value for key, value in given.items()})


def gpu_ids(gpus: object) -> tuple[str, ...]:
    ids = []
    for gpu in as_list(gpus) or ():
        number, text = as_int(gpu), as_text(gpu)
        if number is not None and number >= 0:
            ids.append(str(number))
        elif text and "," not in text:
            ids.append(text)
        else:
            ids.clear()
            break
    if not ids:
        raise refusal(
            "gpus", gpus, "ids such as [4, 5], or None for all that are visible"
        )
    return tuple(ids)


def model_name(name: str, given: object) -> str:
    """A model's name; of what lies on this machine the whole path."""
    text = str(given) if isinstance(given, Path) else as_text(given)
    if not text or not can_be_sent(text):
        raise refusal(name, given, "a model name or a directory, in valid Unicode")
    try:
        is_path = isinstance(given, Path) or Path(text).exists()
    except OSError:  # too long for one
        is_path = False
    # As a path it is meant where this process is now, and not where it goes later.
    return str(Path(text).absolute()) if is_path or text[:2] in ("./", "..") else text


def check_directory(config: object, name: str, what: str = "a directory") -> None:
    """Keep a path as a whole: this process may go elsewhere later."""
    given = getattr(config, name)
    if given is None:
        return
    text = str(given) if isinstance(given, Path) else as_text(given)
    if not text or "\0" in text or not can_be_sent(text):
        raise refusal(name, given, f"{what}, in valid Unicode, or None")
    set_field(config, name, Path(text).absolute())


def check_host_and_port(config: object, name: str, example: str) -> None:
    """Keep where to listen, if it is given."""
    given = getattr(config, name)
    if given is None:
        return
    text = as_text(given) or ""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise refusal(name, given, f"a host and a port, such as {example!r}, or None")
    set_field(config, name, text)


def variable(name: object, value: object) -> tuple[str, str]:
    """An environment variable as other processes can be given it."""
    key, text = as_text(name), as_text(value)
    if key and text is not None and "=" not in key and "\0" not in key + text:
        return key, text
    raise refusal("env", {name: value}, "texts by texts, without NUL, or = in a name")


def check_seconds(config: object, name: str) -> None:
    set_field(config, name, seconds(name, getattr(config, name)))


def seconds(name: str, given: object, *, or_zero: bool = False) -> float:
    """A time that is given, in seconds.

    Raises:
        ConfigError: it is none.
    """
    number = as_float(given)
    is_allowed = number is not None and (number > 0 or (or_zero and number == 0))
    if number is None or not is_allowed or number > _MAX_SECONDS:
        least = "of 0 or more" if or_zero else "above 0"
        allowed = f"a number of seconds {least}, at most {_MAX_SECONDS:g}"
        raise refusal(name, given, allowed)
    return number
