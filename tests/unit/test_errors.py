"""An error is told by its root, and never by nothing."""

from __future__ import annotations

from aseer.errors import ConfigError, describe


def test_an_error_without_text_is_told_by_its_type_and_cause():
    assert describe(KeyError("a")) == "KeyError: 'a'"
    assert describe(TimeoutError()) == "TimeoutError"
    outer = ConfigError()
    outer.__cause__ = OSError("disk")
    assert describe(outer) == "ConfigError: OSError: disk"
    assert describe(ConfigError("own")) == "ConfigError: own"


def test_of_a_bundle_aseers_own_error_is_told():
    own = ExceptionGroup("inner", [ConfigError("own")])
    bundle = ExceptionGroup("outer", [ValueError("other"), own])
    assert describe(bundle) == "ConfigError: own"
    assert describe(ExceptionGroup("outer", [ValueError("other")])) == (
        "ValueError: other"
    )
