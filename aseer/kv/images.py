"""What stands for an image's tokens in the keys of a KV pool. Pure.

Prompts with other images have equal token ids. LMCache puts numbers made from an
image's name in the place of its tokens before it makes keys of them, and so must
whoever tells it of tokens.
"""

from __future__ import annotations

from array import array
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aseer.inputs.prompt_image import PromptImage

_VALUES_PER_DIGEST = 8
_MASK = (1 << 31) - 1


def pool_tokens(prompt: bytes, images: Sequence[PromptImage]) -> bytes:
    """The prompt's tokens as the pool knows them; int32, as the prompt is."""
    if not images:
        return prompt
    ids = array("i", prompt)
    for image in images:
        end = image.start + image.num_tokens
        ids[image.start : end] = _values(image.key, image.num_tokens)
    return ids.tobytes()


def _values(name: str, num: int) -> array[int]:
    """As `lmcache.integration.vllm.utils.mm_hash_to_token_values` has them."""
    seed = sha256(name.encode()).digest()
    values = array("i")
    for counter in range(-(-num // _VALUES_PER_DIGEST)):
        block = sha256(seed + counter.to_bytes(8, "big")).digest()
        for i in range(0, len(block), 4):
            values.append(int.from_bytes(block[i : i + 4], "big") & _MASK)
    return values[:num]
