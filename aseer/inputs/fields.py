"""Checks of single settings: from what is given to what is kept, in plain data.

A check takes the setting's name and what is given. It raises a `ConfigError` that says
what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aseer.errors import ConfigError
from aseer.inputs.plain import (
    INT32_MAX,
    as_bool,
    as_data,
    as_float,
    as_int,
    as_list,
    as_text,
    can_be_sent,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# As good as for ever, and what clocks and timers of all kinds can count.
_MAX_SECONDS = 1e9
MAX_PORT = 65_535


def refusal(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name}={value!r:.300} is not allowed; give {allowed}")


def whole(
    low: int,
    high: int = INT32_MAX,
    *,
    optional: bool = False,
    allowed: str | None = None,
) -> Callable[[str, object], int]:
    """A check for whole numbers from `low` to `high`.

    Args:
        optional: whether None is allowed, too, as the message says then.
        allowed: the message's words, where the bounds do not say it all.
    """
    rest = ", or None for the default" if optional else ""

    def check(name: str, given: object) -> int:
        number = as_int(given)
        if number is None or number < low:
            raise refusal(name, given, allowed or f"an int >= {low}{rest}")
        if number > high:
            raise refusal(name, given, allowed or f"an int <= {high}{rest}")
        return number

    return check


def number(low: float, high: float, allowed: str) -> Callable[[str, object], float]:
    """A check for finite numbers from `low` to `high`; `allowed` are its words."""

    def check(name: str, given: object) -> float:
        found = as_float(given)
        if found is None or not low <= found <= high:
            raise refusal(name, given, allowed)
        return found

    return check


def switch(name: str, given: object) -> bool:
    """True or False."""
    found = as_bool(given)
    if found is None:
        raise refusal(name, given, "True or False")
    return found


def mapping(name: str, given: object) -> Any:
    """A mapping that other processes can be told, as a dict of plain data."""
    if not isinstance(given, Mapping):
        raise refusal(name, given, "a mapping")
    return as_data(given, name)


def one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    """The word among `allowed` that was given; YAML reads a bare `off` as False."""
    text = "off" if value is False and "off" in allowed else as_text(value)
    if text is None or text not in allowed:
        raise refusal(name, value, f"one of {', '.join(allowed)}")
    return text


def gpu_ids(name: str, given: object) -> tuple[str, ...]:
    """Ids of GPUs, as CUDA_VISIBLE_DEVICES names them; at least one."""
    ids = []
    for gpu in as_list(given) or ():
        index, text = as_int(gpu), as_text(gpu)
        if index is not None and index >= 0:
            ids.append(str(index))
        elif text and "," not in text:
            ids.append(text)
        else:
            ids.clear()
            break
    if not ids:
        raise refusal(
            name, given, "ids such as [4, 5], or None for all that are visible"
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


def dtype_name(name: str, given: object) -> str:
    """A dtype's name, whichever vLLM knows."""
    text = as_text(given)
    if not text or not can_be_sent(text):
        raise refusal(name, given, 'a name, such as "bfloat16"')
    return text


def path_of(what: str) -> Callable[[str, object], Path]:
    """A check for paths, which are kept whole: this process may go elsewhere later.

    Args:
        what: the path is of, such as "a directory", for the message.
    """

    def check(name: str, given: object) -> Path:
        text = str(given) if isinstance(given, Path) else as_text(given)
        if not text or "\0" in text or not can_be_sent(text):
            raise refusal(name, given, f"{what}, in valid Unicode, or None")
        return Path(text).absolute()

    return check


directory = path_of("a directory")
file_path = path_of("a file's path")


def host_and_port(name: str, given: object) -> str:
    """Where to listen, without a scheme."""
    text = as_text(given) or ""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        allowed = "a host and a port, such as '127.0.0.1:9464', or None"
        raise refusal(name, given, allowed)
    return text


def variables(name: str, given: object) -> dict[str, str]:
    """Environment variables as other processes can be given them."""
    if not isinstance(given, Mapping):
        raise refusal(name, given, "a mapping")
    kept = {}
    for variable, value in given.items():
        key, text = as_text(variable), as_text(value)
        is_sound = key and text is not None and "\0" not in key + text
        if not key or text is None or not is_sound or "=" in key:
            allowed = "texts by texts, without NUL, or = in a name"
            raise refusal(name, {variable: value}, allowed)
        kept[key] = text
    return kept


def seconds(name: str, given: object, *, or_zero: bool = False) -> float:
    """A time that is given, in seconds.

    Raises:
        ConfigError: it is none.
    """
    found = as_float(given)
    is_allowed = found is not None and (found > 0 or (or_zero and found == 0))
    if found is None or not is_allowed or found > _MAX_SECONDS:
        least = "of 0 or more" if or_zero else "above 0"
        allowed = f"a number of seconds {least}, at most {_MAX_SECONDS:g}"
        raise refusal(name, given, allowed)
    return found
