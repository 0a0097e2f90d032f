"""Images are in the keys of a KV pool, in the place of their tokens."""

from __future__ import annotations

from array import array

from aseer.inputs.prompt_image import PromptImage
from aseer.kv.images import pool_tokens

PROMPT = array("i", [1, 9, 9, 9, 2, *[9] * 20]).tobytes()


def images(*keys: str) -> list[PromptImage]:
    places = [(1, 3), (5, 20)]
    return [
        PromptImage(key=key, path="", start=start, num_tokens=num)
        for key, (start, num) in zip(keys, places, strict=True)
    ]


def test_equal_tokens_with_other_images_are_told_apart() -> None:
    one, other = (pool_tokens(PROMPT, images("one", key)) for key in ("a", "b"))
    assert one[: 5 * 4] == other[: 5 * 4]
    assert one[5 * 4 : 6 * 4] != other[5 * 4 : 6 * 4]
    assert pool_tokens(PROMPT, []) == PROMPT
