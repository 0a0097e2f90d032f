"""What users give, as plain data: Python's own numbers, texts, lists and dicts.

Only these can be told to another process. numpy's numbers, arrays and tensors of one
number, sets, tuples and subclasses of `str` mean the same, and are turned into it once,
where they come in. The functions that return None do so for what means something else;
the caller knows the words for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

from aseer.errors import ConfigError

INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1
# Settings nest a few levels; what is deeper than this refers to itself.
_MAX_DEPTH = 100


def unwrapped(value: object) -> object:
    """The number that one of numpy's, or an array or tensor of one, stands for.

    Everything else is returned as it is, and so is a tensor without values.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            return value.item()
        except RuntimeError:  # of torch, on its device "meta"
            return value
    return value


def as_bool(value: object) -> bool | None:
    """True or False, if it is one of them."""
    value = unwrapped(value)
    return value if isinstance(value, bool) else None


def as_int(value: object) -> int | None:
    """The whole number, if it is one; booleans and floats are not."""
    value = unwrapped(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int(value)


def as_float(value: object) -> float | None:
    """The finite number, if it is one; booleans are not."""
    value = unwrapped(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_text(value: object) -> str | None:
    """The text, if it is one, as a `str` and no subclass."""
    # Not str(): an enumeration's member that is a text would give its name.
    return str.__str__(value) if isinstance(value, str) else None


def as_list(value: object) -> list[Any] | None:
    """The items of a list, tuple, set, array or tensor; texts and bytes are none."""
    tolist = getattr(value, "tolist", None)
    if tolist is not None:
        try:
            value = tolist()
        except RuntimeError:  # a tensor without values
            return None
    if isinstance(value, str | bytes | bytearray | memoryview):
        return None
    if isinstance(value, Sequence):
        return list(value)
    if isinstance(value, Set):
        try:
            return sorted(value)
        except TypeError:
            return list(value)
    return None


def can_be_sent(text: str) -> bool:
    """Whether a text is Unicode that UTF-8 can express: without lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_data(value: object, name: str, depth: int = 0) -> Any:
    """A copy in plain data, whatever is nested in it.

    Args:
        value: None, a boolean, a number of 64 bits, a text, or a list, set, array or
            mapping (whose keys are texts) of such.
        name: for messages, such as "engine_args".
    Raises:
        ConfigError: it is, or has in it, something else; the message says where.
    """
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{name:.200} is nested more than {_MAX_DEPTH} levels deep")
    value = unwrapped(value)
    if value is None or isinstance(value, bool):
        return value
    if (text := as_text(value)) is not None:
        if not can_be_sent(text):
            raise ConfigError(f"{name}={text!r:.100} is no valid Unicode")
        return text
    if isinstance(value, Real):
        return _as_number(value, name)
    if isinstance(value, Mapping):
        data = {}
        for key, item in value.items():
            text = as_text(key)
            if text is None or not can_be_sent(text):
                raise ConfigError(
                    f"{name} has the key {key!r:.100}; keys are texts where other "
                    "processes are told of them"
                )
            data[text] = as_data(item, f"{name}[{text!r}]", depth + 1)
        return data
    items = as_list(value)
    if items is None:
        raise ConfigError(
            f"{name}={value!r:.100} is a {type(value).__name__}, which other processes "
            "cannot be told; give numbers, texts, lists and dicts"
        )
    return [as_data(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(items)]


def _as_number(value: Real, name: str) -> int | float:
    number = as_int(value)
    if number is not None:
        if not -INT64_MAX - 1 <= number <= INT64_MAX:
            raise ConfigError(
                f"{name}={number!r:.100} is not allowed; give ints of 64 bits"
            )
        return number
    as_finite = as_float(value)
    if as_finite is None:
        raise ConfigError(f"{name}={value!r} is not allowed; give finite numbers")
    return as_finite
