"""Prompts with images: three forms, one meaning; what does not fit is told."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from aseer.errors import ConfigError
from aseer.groups import Group, GroupResolver
from aseer.inputs.images import ImageStore
from aseer.inputs.prompt import place_images
from aseer.inputs.prompt_image import without_images
from aseer.journal.keys import KeyMaker
from aseer.sampling import SamplingParams
from tests.unit.builders import info_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from aseer.types import Task

pytest.importorskip("PIL.Image")

PAD = 77
INFO = replace(info_of(), max_images=2, image_token_id=PAD, vocab_size=100)


def image(height: int, width: int, value: int = 0) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


class Seeing:
    """A token a word, and one for 10 x 10 pixels; a chat is its parts in a row."""

    def encode_text(self, text: str) -> list[int]:
        return [PAD if word == "<image>" else len(word) for word in text.split()]

    def encode_chat(self, messages: Sequence[Any], **settings: Any) -> list[int]:
        ids = []
        for message in messages:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            for part in parts:
                ids += self.encode_text(part.get("text", "<image>"))
        return ids

    def count_image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [height * width // 100 for height, width in sizes]


def resolve(tmp_path: Path, prompt: Any, info: Any = INFO, **settings: Any) -> Task:
    store = ImageStore(tmp_path)
    resolver = GroupResolver(info, Seeing(), SamplingParams(), image_store=store)
    return resolver.resolve(Group(prompt, **settings))


def ids_of(task: Task) -> list[int]:
    return array("i", task.prompt).tolist()


TWO = [image(10, 30), image(20, 20)]  # three tokens and four
EXPANDED = [1, *[PAD] * 3, 2, *[PAD] * 4, 3]


@pytest.mark.parametrize(
    ("prompt", "images"),
    [
        ([1, PAD, 2, PAD, 3], TWO),
        (EXPANDED, TWO),
        (np.array(EXPANDED), TWO),
        ("a <image> bb <image> ccc", TWO),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "image"},
                        {"type": "text", "text": "bb"},
                        {"type": "image"},
                        {"type": "text", "text": "ccc"},
                    ],
                }
            ],
            TWO,
        ),
        (
            [
                {"role": "system", "content": "a"},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": TWO[0]},
                        {"type": "text", "text": "bb"},
                        {"type": "image"},
                        {"type": "text", "text": "ccc"},
                    ],
                },
            ],
            TWO[1:],
        ),
    ],
)
def test_every_form_of_a_prompt_is_expanded_alike(
    tmp_path: Path, prompt: Any, images: list[Any]
) -> None:
    task = resolve(tmp_path, prompt, images=images)
    assert ids_of(task) == EXPANDED
    assert task.num_prompt_tokens == len(EXPANDED)
    assert [(i.start, i.num_tokens) for i in task.images] == [(1, 3), (5, 4)]
    assert without_images(task.prompt, task.images).tolist() == [1, PAD, 2, PAD, 3]
    assert len({i.key for i in task.images}) == 2


def test_images_in_a_row_are_told_apart() -> None:
    for ids in ([PAD, PAD, 5], [PAD] * 7 + [5]):
        expanded, starts = place_images(ids, PAD, [3, 4])
        assert expanded.tolist() == [PAD] * 7 + [5]
        assert starts == [0, 3]


def test_one_prompt_with_other_images_is_another_prompt(tmp_path: Path) -> None:
    ids = [1, PAD, 2]
    one, same, other = (
        resolve(tmp_path, ids, images=[image(10, 30, value)]) for value in (0, 0, 9)
    )
    assert one.prompt == same.prompt == other.prompt
    assert one.prompt_key == same.prompt_key != other.prompt_key
    keys = [KeyMaker().key_of(task, has_own_id=False) for task in (one, same, other)]
    assert keys[0] == keys[1] != keys[2], "a journal's"
    assert resolve(tmp_path, [1, 2]).prompt_key == resolve(tmp_path, [1, 2]).prompt


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ([1, PAD], [b"no image"], r"images\[0\]: an image \(a bytes\) is no image"),
        ([1, PAD, PAD, PAD], [image(10, 10)] * 3, "3 images, and .* may have 2"),
        ([1, 2], TWO, r"0 times for 2 images; .*\(3 \+ 4 = 7"),
        ([PAD] * 5, TWO, "5 times for 2 images"),
        ([*[PAD] * 4, 1, *[PAD] * 3], TWO, "image 1 begins at 3 and has 4"),
        ([1, PAD, 2], None, "and no images"),
        ([1, PAD, 2], [], "and no images"),
        ([1, PAD], image(10, 10), "images is a ndarray; give a list"),
        ([1, PAD], "a.png", "images is a str; give a list"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            None,
            "more content parts for images than there are images",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            TWO[:1],
            "1 images, and its messages have 0",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a"}]}],
            None,
            "has a video",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_groups_name(
    tmp_path: Path, prompt: Any, images: Any, says: str
) -> None:
    with pytest.raises(ConfigError, match=f"group 'mine': .*{says}"):
        resolve(tmp_path, prompt, images=images, group_id="mine")


def test_a_model_that_does_not_see_takes_no_images(tmp_path: Path) -> None:
    blind = info_of()
    with pytest.raises(ConfigError, match="1 images, and this model takes none"):
        resolve(tmp_path, [1, PAD], blind, images=[image(10, 10)])
    assert ids_of(resolve(tmp_path, [1, PAD], blind)) == [1, PAD]


def test_an_engine_with_other_hosts_takes_no_images() -> None:
    resolver = GroupResolver(INFO, Seeing(), SamplingParams())
    with pytest.raises(ConfigError, match=r"1 images, .* instances on other hosts"):
        resolver.resolve(Group([1, PAD], images=[image(10, 10)]))


def test_an_expanded_prompt_must_fit_the_models_length(tmp_path: Path) -> None:
    short = replace(INFO, max_model_len=9)
    with pytest.raises(ConfigError, match="its prompt of 10 tokens leaves no room"):
        resolve(tmp_path, [1, PAD, 2, PAD, 3], short, images=TWO)
