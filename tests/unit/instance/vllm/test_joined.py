"""A user's extension of vLLM's workers is joined with ours, and replaces nothing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from aseer.errors import ConfigError
from aseer.instance.vllm import joined


class Ours:
    aseer_weights = None

    def aseer_commit_weights(self):
        return "ours"


class Theirs:
    def hello(self):
        return "theirs"


class Clashing:
    def aseer_commit_weights(self):
        return "theirs"


class Derived(Ours):
    pass


def resolve(qualified_name):
    """As vLLM does."""
    module, name = qualified_name.rsplit(".", 1)
    __import__(module)
    return getattr(sys.modules[module], name)


@pytest.fixture
def _fake_worker(monkeypatch):
    """Unit tests do not import vLLM, which ours does."""
    worker = SimpleNamespace(WorkerExtension=Ours)
    monkeypatch.setitem(sys.modules, "aseer.instance.vllm.worker", worker)
    monkeypatch.setitem(sys.modules, "package.extensions", SimpleNamespace(It=Theirs))
    monkeypatch.setitem(sys.modules, "package", SimpleNamespace())
    joined.__getattr__.cache_clear()
    yield
    joined.__getattr__.cache_clear()


@pytest.mark.usefixtures("_fake_worker")
def test_a_worker_finds_both_under_one_name():
    found = resolve(joined.joined_name("package.extensions.It"))
    assert (found().aseer_commit_weights(), found().hello()) == ("ours", "theirs")
    assert found is resolve(joined.joined_name("package.extensions.It"))


def test_what_joins_nothing_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = joined.nothing


def test_an_extension_that_would_replace_ours_is_refused():
    with pytest.raises(ConfigError, match=r"'Clashing' has \['aseer_commit_weights'\]"):
        joined.join(Ours, Clashing)


def test_an_extension_that_derives_from_ours_is_enough():
    assert joined.join(Ours, Derived) is Derived
