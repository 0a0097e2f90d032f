"""Settings whose fields say themselves what they mean, and what they allow. Pure.

    chunk_size: Annotated[int, whole(0), "the most tokens that ..."] = 2048

A field has its type, a check that makes what is kept of what is given, and its meaning.
The check has a name in the module: a lambda would not find the module's other names. A
boolean, a `Literal` and a mapping need no check but their type. `check_fields` keeps
what the checks make of an object's fields; rules about several fields are the class's
own. `documented` writes the meanings into the class's docstring.

They are dataclasses with these checks, and no `msgspec.Struct`: msgspec checks a
Struct's constraints only where it decodes one, takes none of numpy's numbers, and is
unknown to `dataclasses.replace`, which users call.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from aseer.inputs.fields import mapping, one_of, refusal, switch

#: From a setting's name and what is given to what is kept, in plain data. It raises a
#: `ConfigError` that says what is allowed.
Check = Callable[[str, Any], Any]
Settings = TypeVar("Settings")
Given = TypeVar("Given", contravariant=True)
Kept = TypeVar("Kept", covariant=True)

_WIDTH = 84  # of docstrings


class Resolved(Generic[Given, Kept]):
    """The type of a field that is given as `Given`, and kept and read as `Kept`.

    It is for type checkers alone, which take it for a descriptor. To mypy a field
    without a default cannot be one.
    """

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: type) -> Any: ...
        @overload
        def __get__(self, instance: object, owner: type) -> Kept: ...
        def __get__(self, instance: object, owner: type) -> Any: ...
        def __set__(self, instance: object, value: Given) -> None: ...


AnyPath = Resolved[Path | str | None, Path | None]


def default(value: object) -> Any:
    """The default of a `Resolved` field, as users would give it."""
    return value


class Field(NamedTuple):
    """What a field's annotation says.

    Attributes:
        takes_none: None is kept as it is, without a check.
    """

    name: str
    check: Check
    takes_none: bool
    meaning: str


def fields_of(cls: Any) -> tuple[Field, ...]:
    """What the annotations of a class of settings say, in order.

    Raises:
        TypeError: a field has no check, or no meaning.
    """
    return _read(cls)


@cache
def _read(cls: type) -> tuple[Field, ...]:
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in fields(cls)]
    return tuple(_field(name, hints[name]) for name in names)


def check_fields(settings: object, prefix: str = "") -> None:
    """Keep what the checks make of each field of a dataclass, which may be frozen.

    Args:
        prefix: of the fields' names in messages.
    Raises:
        ConfigError: a field's value is not allowed.
    """
    for field in fields_of(type(settings)):
        given = getattr(settings, field.name)
        if given is None and field.takes_none:
            continue
        kept = field.check(prefix + field.name, given)
        object.__setattr__(settings, field.name, kept)


def documented(cls: type[Settings]) -> type[Settings]:
    """Add the meanings of its fields to the docstring of a class of settings, and let
    its signature have their types alone: what `help` and notebooks show.
    """
    if cls.__doc__:  # not with -OO
        lines = [inspect.cleandoc(cls.__doc__), "", "Attributes:"]
        lines += [_paragraph(field) for field in fields_of(cls)]
        cls.__doc__ = "\n".join(lines)
    signature = inspect.signature(cls)
    hints = get_type_hints(cls, include_extras=True)
    plain = [
        parameter.replace(annotation=_kind_of(hints[name]))
        for name, parameter in signature.parameters.items()
    ]
    cls.__signature__ = signature.replace(parameters=plain)  # type: ignore[attr-defined]
    return cls


def settings_of(cls: type[Settings], short: str) -> Check:
    """Settings that are given as such, as a mapping of their fields (as a YAML file has
    them), or by the value of their field `short` alone.
    """

    def check(name: str, given: Any) -> Settings:
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            return cls(**{short: given})
        known = [field.name for field in fields_of(cls)]
        for key in given:
            if key not in known:
                raise refusal(f"{name}'s key", key, f"some of {', '.join(known)}")
        return cls(**{str(key): value for key, value in given.items()})

    return check


def _field(name: str, hint: Any) -> Field:
    kind, marks = _kind_of(hint), get_args(hint)[1:]
    takes_none = NoneType in get_args(kind)
    meanings = [mark for mark in marks if isinstance(mark, str)]
    checks = [mark for mark in marks if callable(mark)]
    check = checks[0] if checks else _check_of(kind)
    if check is None or not meanings:
        raise TypeError(f"{name} has no check, or no meaning: {hint}")
    return Field(name, check, takes_none, " ".join(meanings[0].split()))


def _kind_of(hint: Any) -> Any:
    """The type of what may be given for a field."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(kind)[0] if get_origin(kind) is Resolved else kind


def _check_of(kind: Any) -> Check | None:
    """The check that a type alone says."""
    kinds = [each for each in get_args(kind) if each is not NoneType]
    if NoneType in get_args(kind) and len(kinds) == 1:
        kind = kinds[0]
    if kind is bool:
        return switch
    if get_origin(kind) is Literal:
        return partial(_word, get_args(kind))
    return mapping if get_origin(kind) is Mapping else None


def _word(allowed: tuple[str, ...], name: str, given: object) -> str:
    return one_of(name, given, allowed)


def _paragraph(field: Field) -> str:
    return textwrap.fill(
        f"{field.name}: {field.meaning}",
        width=_WIDTH,
        initial_indent=" " * 4,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
