"""Checks of single sampling settings; `aseer.sampling` has the settings. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aseer.inputs.fields import refusal, whole
from aseer.inputs.plain import INT32_MAX, as_float, as_int, as_list, as_text
from aseer.inputs.structured import check_structured_outputs

if TYPE_CHECKING:
    from aseer.errors import ConfigError

# Engines compute in float32. A bias is multiplied by up to 1e9 (repetition_penalty) and
# divided by as little as 0.01 (vLLM's least temperature), and must stay finite.
_MAX_BIAS = 1e20
_ID_NAME = re.compile("[0-9]{1,10}")
# Signed or unsigned, since the seed is hashed.
_seed = whole(
    -(1 << 63), (1 << 64) - 1, allowed="an int of 64 bits, or None for no seed"
)


def group_seed(name: str, given: object) -> int | None:
    """A seed; -1 is none, as in vLLM."""
    number = _seed(name, given)
    return None if number == -1 else number


def texts(name: str, given: object) -> tuple[str, ...]:
    """Texts that are not empty; None stands for no text."""
    items = [] if given is None else as_list(given)
    if items is None:
        raise refusal(name, given, "a list of strings")
    found = [as_text(item) for item in items]
    if not all(found):
        raise refusal(name, given, "a list of non-empty strings")
    return tuple(text for text in found if text)


def stops(name: str, given: object) -> tuple[str, ...]:
    """Stop strings, or a single one, as vLLM takes it."""
    return texts(name, (given,) if isinstance(given, str) else given)


def token_ids(name: str, given: object) -> tuple[int, ...]:
    """Token ids; None stands for no id."""
    if given is None:
        return ()
    items = as_list(given)
    if items is None:
        raise refusal(name, given, "a list of token ids")
    ids = [as_int(item) for item in items]
    if not all(i is not None and 0 <= i <= INT32_MAX for i in ids):
        raise refusal(name, given, f"a list of token ids >= 0, at most {INT32_MAX}")
    return tuple(i for i in ids if i is not None)


def some_token_ids(name: str, given: object) -> tuple[int, ...]:
    """Token ids, at least one."""
    if as_list(given) == []:
        raise refusal(name, given, "at least one id, or None for all")
    return token_ids(name, given)


def biases(name: str, given: object) -> dict[int, float] | None:
    """Biases by token id; a mapping without any stands for None."""
    if not isinstance(given, Mapping):
        raise _no_biases(name, given)
    found: dict[int, float] = {}
    for key, value in given.items():
        # Keys that come from JSON are texts.
        is_name = isinstance(key, str) and _ID_NAME.fullmatch(key)
        token, bias = as_int(int(key) if is_name else key), as_float(value)
        if token is None or not 0 <= token <= INT32_MAX:
            raise _no_biases(name, given)
        if bias is None or abs(bias) > _MAX_BIAS:
            raise _no_biases(name, given)
        found[token] = bias
    return found or None


def structure(_: str, given: object) -> dict[str, Any]:
    """Structured output; its messages name the key that is wrong."""
    return check_structured_outputs(given)


def _no_biases(name: str, given: object) -> ConfigError:
    allowed = f"a mapping of token ids to numbers from -{_MAX_BIAS:g} to {_MAX_BIAS:g}"
    return refusal(name, given, allowed)
