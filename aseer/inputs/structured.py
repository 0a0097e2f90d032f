"""What structured output a request asks for, checked without vLLM.

A grammar itself is the engine's to judge. What no engine takes is refused here: unknown
keys, none or several constraints, values of another type, text that is no JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aseer.errors import ConfigError
from aseer.inputs.plain import as_data

_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_OPTIONS = (
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
)
# vLLM's own limit, since the time that a schema's conversion takes grows steeply.
_MAX_SCHEMA_DEPTH = 64


def check_structured_outputs(given: object) -> dict[str, Any]:
    """The constraint and its options as plain data, as vLLM takes them.

    Raises:
        ConfigError: no engine takes it.
    """
    if not isinstance(given, Mapping):
        raise _bad(given, 'a mapping such as {"regex": ...}')
    data = as_data(given, "sampling structured_outputs")
    # What is switched off, in any of vLLM's spellings, asks for nothing.
    kept = {k: v for k, v in data.items() if v is not None and v is not False}
    unknown = sorted(set(kept) - {*_CONSTRAINTS, *_OPTIONS})
    if unknown:
        raise ConfigError(
            f"sampling structured_outputs has unknown keys {unknown}; known are "
            f"{sorted((*_CONSTRAINTS, *_OPTIONS))}"
        )
    constraints = [name for name in _CONSTRAINTS if name in kept]
    if len(constraints) != 1:
        raise _bad(
            given, 'a mapping such as {"regex": ...}, with one of ' + str(_CONSTRAINTS)
        )
    name = constraints[0]
    allowed = _allowed(name, kept[name])
    if allowed:
        raise ConfigError(
            f"sampling structured_outputs[{name!r}]={kept[name]!r:.200} is not "
            f"allowed; give {allowed}"
        )
    for option in _OPTIONS:
        kind = str if option == "whitespace_pattern" else bool
        if option in kept and not isinstance(kept[option], kind):
            raise ConfigError(
                f"sampling structured_outputs[{option!r}]={kept[option]!r:.200} is not "
                f"allowed; give a {kind.__name__}"
            )
    return kept


def _allowed(name: str, value: object) -> str | None:
    """What is allowed where the value is not; None where it is."""
    if name == "json_object":
        return None if value is True else "True"
    if name == "choice":
        items = value if isinstance(value, list) else []
        is_choice = items and all(isinstance(item, str) and item for item in items)
        return None if is_choice else "a list of non-empty texts"
    if name == "json" and isinstance(value, dict):
        return _schema_fault(value)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        rest = ", or a JSON schema as a dict" if name == "json" else ""
        return f"a text that is not empty and has no NUL{rest}"
    if name not in ("json", "structural_tag"):
        return None
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        return f"JSON ({error})"
    return _schema_fault(schema) if name == "json" else None


def _schema_fault(schema: object) -> str | None:
    level = [schema] if isinstance(schema, dict | list) else []
    for _ in range(_MAX_SCHEMA_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    return f"a schema that nests at most {_MAX_SCHEMA_DEPTH} levels" if level else None


def _bad(value: object, allowed: str) -> ConfigError:
    return ConfigError(
        f"sampling structured_outputs={value!r:.200} is not allowed; give {allowed}"
    )
