"""Images in the keys of a KV pool are what LMCache makes of them."""

from __future__ import annotations

from array import array

import pytest

from aseer.inputs.prompt_image import PromptImage
from aseer.kv.images import pool_tokens

PROMPT = array("i", [1, 9, 9, 9, 2, *[9] * 20]).tobytes()


def images(*keys: str) -> list[PromptImage]:
    places = [(1, 3), (5, 20)]
    return [
        PromptImage(key=key, path="", start=start, num_tokens=num)
        for key, (start, num) in zip(keys, places, strict=True)
    ]


def test_an_images_tokens_are_those_of_lmcache() -> None:
    utils = pytest.importorskip("lmcache.integration.vllm.utils")
    expected = array("i", PROMPT)
    expected[1:4] = array("i", utils.mm_hash_to_token_values("one", 3))
    expected[5:25] = array("i", utils.mm_hash_to_token_values("other", 20))
    assert pool_tokens(PROMPT, images("one", "other")) == expected.tobytes()


def test_equal_tokens_with_other_images_are_told_apart() -> None:
    one, other = (pool_tokens(PROMPT, images("one", key)) for key in ("a", "b"))
    assert one[: 5 * 4] == other[: 5 * 4]
    assert one[5 * 4 : 6 * 4] != other[5 * 4 : 6 * 4]
    assert pool_tokens(PROMPT, []) == PROMPT
