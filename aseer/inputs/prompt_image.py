"""An image in its place in a prompt."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class PromptImage:
    """An image of a prompt.

    Attributes:
        key: a hash of its bytes: two images of one key are the same.
        path: of its file, which is there as long as something refers to this object.
        start: its first token in the prompt.
        num_tokens: that it takes there, all with the model's id for images.
    """

    key: str
    path: str
    start: int
    num_tokens: int


def without_images(prompt: bytes, images: Sequence[PromptImage]) -> array[int]:
    """The prompt's token ids with one token an image, as processors are given them.

    Args:
        prompt: int32; any tokens may follow.
        images: in the order of their places in it.
    """
    ids = array("i", prompt)
    for image in reversed(images):
        del ids[image.start + 1 : image.start + image.num_tokens]
    return ids
