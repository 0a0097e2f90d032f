"""A user's extension of vLLM's workers, for `test_weights.py`."""

from __future__ import annotations

import sys

SAYS = "the user's extension is a part of"


class Extension:
    """Mixed into the workers, beside aseer's own."""

    def __init_subclass__(cls) -> None:
        sys.stderr.write(f"{SAYS} {cls.__name__}\n")

    def hello_from_the_user(self) -> str:
        return "hello"
