"""Settings whose fields say themselves what they mean and allow."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.inputs.fields import directory, number, whole
from aseer.inputs.kv_pool import KvPoolConfig
from aseer.inputs.settings import (
    AnyPath,
    Resolved,
    check_fields,
    default,
    documented,
    fields_of,
)
from aseer.inputs.speculation import SpeculationConfig
from aseer.sampling import SamplingParams

CLASSES = (EngineConfig, KvPoolConfig, SamplingParams, SpeculationConfig)


@documented
@dataclass(frozen=True, kw_only=True)
class Oven:
    """An oven."""

    degrees: Annotated[int, whole(20, 300), "how hot it is, in degrees Celsius."] = 180
    share: Annotated[float | None, number(0, 1, "a share"), "of its room."] = None
    tray: Annotated[AnyPath, directory, "what is in it."] = default(None)
    lit: Annotated[bool, "whether its lamp is on."] = False
    notes: Annotated[Mapping[str, Any] | None, "anything."] = None

    def __post_init__(self) -> None:
        check_fields(self, "the oven's ")


def test_a_field_is_kept_as_its_check_makes_it() -> None:
    oven = Oven(tray="a", notes={"a": (1, 2)})
    assert (oven.tray, oven.notes) == (Path("a").absolute(), {"a": [1, 2]})
    assert (oven.degrees, oven.share, oven.lit) == (180, None, False)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"degrees": 301}, "the oven's degrees=301 is not allowed; give an int <= 300"),
        ({"degrees": None}, "degrees=None is not allowed; give an int >= 20"),
        ({"share": 2}, "the oven's share=2 is not allowed; give a share"),
        ({"lit": None}, "lit=None is not allowed; give True or False"),
        ({"notes": []}, "the oven's notes=\\[\\] is not allowed; give a mapping"),
    ],
)
def test_what_a_field_does_not_allow_is_named(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Oven(**given)


def test_the_fields_meanings_are_in_the_docstring() -> None:
    lines = (Oven.__doc__ or "").splitlines()
    assert lines[:3] == ["An oven.", "", "Attributes:"]
    assert lines[3] == "    degrees: how hot it is, in degrees Celsius."
    assert len(lines) == 3 + len(fields(Oven))
    for cls in CLASSES:
        for field in fields_of(cls):
            assert f"\n    {field.name}: {field.meaning[:20]}" in (cls.__doc__ or "")


def test_a_field_without_a_check_or_a_meaning_is_a_mistake_of_the_class() -> None:
    @dataclass
    class Unchecked:
        name: Annotated[str, "a name."] = ""

    @dataclass
    class Unexplained:
        size: Annotated[int, whole(0)] = 0

    @dataclass
    class Bare:
        size: int = 0

    for cls in (Unchecked, Unexplained, Bare):
        with pytest.raises(TypeError, match="has no check, or no meaning"):
            check_fields(cls())


GIVEN: dict[str, Any] = {
    "model": Path("/m"),
    "tokenizer": Path("/t"),
    "gpus": [0, "GPU-1"],
    "speculation": "dgds",
    "kv_pool": {"mode": "lmcache", "disk_dir": "kv"},
    "python": "python3",
    "log_dir": "logs",
    "journal_dir": Path("journals"),
    "listen": "tcp://127.0.0.1:5557",
    "key_file": "key",
    "controller_file": "run.json",
    "weights_dir": "weights",
}


def test_what_readers_are_told_a_field_is_it_is() -> None:
    """A type checker believes `Resolved`; nobody else looks at it."""
    config = EngineConfig(**GIVEN)
    found = 0
    for settings in (config, EngineConfig(model="m"), config.kv_pool):
        hints = get_type_hints(type(settings), include_extras=True)
        for field in fields(settings):
            kind = get_args(hints[field.name])[0]
            if get_origin(kind) is not Resolved:
                continue
            value, kept = getattr(settings, field.name), get_args(kind)[1]
            kinds = [get_origin(each) or each for each in get_args(kept) or (kept,)]
            assert isinstance(value, tuple(kinds)), field.name
            found += 1
    assert found == 2 * 10 + 1


def test_settings_are_copied_sent_and_replaced_as_they_are() -> None:
    config = EngineConfig(**GIVEN)
    for other in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        replace(config),
        replace(replace(config, chunk_size=1), chunk_size=config.chunk_size),
    ):
        assert other == config
        assert other is not config
    assert replace(config, kv_pool="off").kv_pool == KvPoolConfig(mode="off")
    params = SamplingParams(stop=("a",), seed=3)
    assert pickle.loads(pickle.dumps(params)) == replace(params) == params
    assert replace(params, seed=-1).seed is None


def test_another_connectors_settings_are_a_mapping() -> None:
    for given in ([], "mooncake", 7):
        with pytest.raises(ConfigError, match=r"kv_transfer_config=.* give a mapping"):
            EngineConfig(model="m", kv_transfer_config=given)  # type: ignore[arg-type]


def test_what_is_given_as_a_sequence_may_be_any() -> None:
    gpus: list[Sequence[int | str]] = [[1, "2"], (1, 2), range(1, 3)]
    assert {EngineConfig(model="m", gpus=some).gpus for some in gpus} == {("1", "2")}


@pytest.mark.parametrize("cls", CLASSES)
def test_a_signature_has_types_and_no_meanings(cls: type) -> None:
    shown = str(inspect.signature(cls))
    assert "Annotated" not in shown
    assert "Resolved" not in shown
    named = inspect.signature(cls).parameters
    assert [*named] == [field.name for field in fields(cls)]


def test_a_signature_says_what_may_be_given() -> None:
    signature = inspect.signature(EngineConfig)
    assert "max_restarts: int = 3" in str(signature)
    log_dir = signature.parameters["log_dir"]  # whose words depend on Python's release
    assert (log_dir.annotation, log_dir.default) == (Path | str | None, None)
