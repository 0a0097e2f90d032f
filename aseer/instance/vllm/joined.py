"""aseer's worker extension and a user's in one class.

vLLM mixes a single class into its workers, which import it by name. Here they find one
for each of a user's: `aseer.instance.vllm.joined.package:module:Extension`, whose last
part names the user's class (vLLM splits at the last dot, hence the colons).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from aseer.errors import ConfigError


def joined_name(theirs: str) -> str:
    """The name of the class that joins ours and theirs."""
    return f"{__name__}.{theirs.replace('.', ':')}"


@functools.cache  # vLLM looks at whether it has mixed this very class in already
def __getattr__(name: str) -> type[Any]:
    module, _, attribute = name.rpartition(":")
    if not module:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aseer.instance.vllm.worker import WorkerExtension

    theirs = getattr(importlib.import_module(module.replace(":", ".")), attribute)
    return join(WorkerExtension, theirs)


def join(ours: type[Any], theirs: type[Any]) -> type[Any]:
    """A class that has all of both.

    Raises:
        ConfigError: both have a public attribute of the same name.
    """
    if issubclass(theirs, ours):
        return theirs
    both = set(dir(ours)) & set(dir(theirs)) - set(dir(object))
    clash = sorted(name for name in both if not name.startswith("__"))
    if clash:
        raise ConfigError(
            f"worker_extension_cls={theirs.__qualname__!r} has {clash}, which aseer's "
            "own extension of vLLM's workers has, too; give them other names"
        )
    return type(f"{ours.__name__}With{theirs.__name__}", (ours, theirs), {})
