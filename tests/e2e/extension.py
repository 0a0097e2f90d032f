"""A user's extension of vLLM's workers, for `test_worker_extension.py`."""

from __future__ import annotations


class Extension:
    """Mixed into the workers, beside aseer's own."""

    def hello_from_the_user(self) -> str:
        return "hello"
