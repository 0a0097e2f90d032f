"""What users give to an engine's calls, checked; settings are in `aseer.config`."""

from __future__ import annotations

from typing import Literal

from aseer.inputs.fields import refusal
from aseer.inputs.plain import INT32_MAX, as_int, as_text

Transfer = Literal["auto", "host", "ipc", "nccl"]
WakeTags = tuple[Literal["weights"]] | tuple[Literal["kv_cache"]] | None


def check_pause(pause: object) -> None:
    """Refuse what is no way to treat a rollout in progress.

    Raises:
        ConfigError: it is not one.
    """
    if pause is not None and as_text(pause) not in ("abort", "wait"):
        raise refusal("pause", pause, "'abort', 'wait', or None")


def check_transfer(transfer: object) -> None:
    """Refuse what is no way for weights to go.

    Raises:
        ConfigError: it is not one.
    """
    if as_text(transfer) not in ("auto", "host", "ipc", "nccl"):
        raise refusal("transfer", transfer, "'auto', 'host', 'ipc' or 'nccl'")


def check_sleep_level(level: object) -> int:
    """The level of sleep, 1 or 2.

    Raises:
        ConfigError: it is none.
    """
    number = as_int(level)
    if number not in (1, 2):
        raise refusal("level", level, "1, which keeps the weights, or 2")
    return number


def check_wake_tags(tags: object) -> WakeTags:
    """What is to wake: weights, KV caches, or None for all there is.

    Raises:
        ConfigError: it is none of that.
    """
    if tags is None:
        return None
    named = {tags} if isinstance(tags, str) else set()
    if isinstance(tags, list | tuple | set | frozenset):
        named = {str(tag) for tag in tags}
    if named == {"weights"}:
        return ("weights",)
    if named == {"kv_cache"}:
        return ("kv_cache",)
    if named != {"weights", "kv_cache"}:
        raise refusal("tags", tags, "['weights'], ['kv_cache'], both, or None for all")
    return None


def check_chunk_size(chunk_size: object) -> int:
    """The chunk size in tokens.

    Raises:
        ConfigError: it is not an int >= 0.
    """
    size = as_int(chunk_size)
    if size is None or not 0 <= size <= INT32_MAX:
        allowed = f"an int >= 1, or 0 for undivided; at most {INT32_MAX}"
        raise refusal("chunk_size", chunk_size, allowed)
    return size
