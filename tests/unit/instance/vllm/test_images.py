"""Prompts with images go to vLLM as it takes them, and what it makes is compared."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from aseer.errors import EngineError
from aseer.inputs.images import ImageStore, read_image
from aseer.types import Chunk, ChunkId, GroupId, InstanceId, RequestId

pytest.importorskip("PIL.Image")

from aseer.instance.vllm import images as images_module

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PAD = 77
EXPANDED = [1, PAD, PAD, PAD, 2]


class FakeLLM:
    """Makes three tokens of an image; fails as often at a request's start."""

    def __init__(self, num_failures: int = 0, num_tokens: int = 3) -> None:
        self.num_failures = num_failures
        self.num_tokens = num_tokens
        self.rendered: list[dict[str, Any]] = []
        self.renderer = self
        config = SimpleNamespace(
            hf_config=SimpleNamespace(image_token_id=PAD), is_multimodal_model=True
        )
        self.vllm_config = SimpleNamespace(model_config=config)
        self.info = SimpleNamespace(allowed_mm_limits={"image": 4, "video": 0})

    def get_mm_processor(self) -> FakeLLM:
        return self

    async def render_cmpl_async(
        self, prompts: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        self.rendered += prompts
        ids: list[int] = []
        for token in prompts[0]["prompt_token_ids"]:
            ids += [PAD] * self.num_tokens if token == PAD else [token]
        return [{"prompt_token_ids": ids}]

    async def generate(
        self, prompt: Any, params: Any, request_id: str, lora_request: Any
    ) -> AsyncIterator[Any]:
        if self.num_failures:
            self.num_failures -= 1
            yield output("error")
            return
        yield output(None)
        yield output("length")


def output(reason: str | None) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)])


@pytest.fixture
def chunk(tmp_path: Path) -> Chunk:
    picture = read_image(np.zeros((8, 8, 3), np.uint8))
    image = ImageStore(tmp_path).keep(picture, 1, 3)
    return Chunk(
        chunk_id=ChunkId(0),
        request_id=RequestId("g/0"),
        group_id=GroupId("g"),
        instance_id=InstanceId(0),
        prompt=array("i", EXPANDED).tobytes(),
        generated=b"",
        max_tokens=5,
        min_tokens=0,
        sampling={},
        seed=None,
        num_reserved_blocks=1,
        images=(image,),
    )


async def generated(llm: FakeLLM, chunk: Chunk) -> list[str | None]:
    prompts = images_module.ImagePrompts(llm)
    inputs = array("i", chunk.prompt + chunk.generated).tolist()
    outputs = prompts.generate(chunk, inputs, "salt", None, "r", None)
    return [each.outputs[0].finish_reason async for each in outputs]


def test_the_limits_are_those_of_vllms_processor() -> None:
    llm = FakeLLM()
    found = images_module.ImagePrompts(llm)
    assert (found.max_images, found.image_token_id) == (4, PAD)
    llm.info.allowed_mm_limits["image"] = 0
    found = images_module.ImagePrompts(llm)
    assert (found.max_images, found.image_token_id) == (0, -1)
    llm.vllm_config.model_config.hf_config = SimpleNamespace()
    assert images_module.ImagePrompts(llm).max_images == 0


async def test_vllm_is_given_a_token_an_image_and_the_image_by_name(
    chunk: Chunk,
) -> None:
    llm = FakeLLM()
    chunk.generated = array("i", [5, PAD]).tobytes()
    llm.num_tokens = 3
    with pytest.raises(EngineError, match=r"makes 9 tokens .* counted to have 7"):
        await generated(llm, chunk)  # the fake expands what was generated, too
    (prompt,) = llm.rendered
    assert prompt["prompt_token_ids"] == [1, PAD, 2, 5, PAD]
    assert prompt["multi_modal_uuids"] == {"image": [chunk.images[0].key]}
    assert prompt["multi_modal_data"]["image"][0].size == (8, 8)
    assert prompt["cache_salt"] == "salt"


async def test_what_vllm_wrongly_took_for_kept_is_brought_again(chunk: Chunk) -> None:
    assert await generated(FakeLLM(2), chunk) == [None, "length"]
    assert await generated(FakeLLM(3), chunk) == ["error"]


async def test_other_numbers_of_tokens_than_were_counted_are_an_error(
    chunk: Chunk,
) -> None:
    with pytest.raises(EngineError, match=r"makes 6 tokens .* counted to have 5"):
        await generated(FakeLLM(num_tokens=4), chunk)


async def test_an_image_that_is_gone_is_an_error_of_the_chunk(chunk: Chunk) -> None:
    llm = FakeLLM()
    chunk.images = tuple(
        type(i)(key=i.key, path=i.path + "x", start=1, num_tokens=3)
        for i in chunk.images
    )
    with pytest.raises(EngineError, match="an image cannot be read"):
        await generated(llm, chunk)


async def test_decoded_images_are_kept_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, llm = ImageStore(tmp_path), FakeLLM()
    kept = [
        store.keep(read_image(np.full((8, 8, 3), i, np.uint8)), 1, 3) for i in range(4)
    ]
    monkeypatch.setattr(images_module, "_MAX_DECODED_BYTES", 2 * 8 * 8 * 3)
    decoded: list[Path] = []
    decode = images_module._decode

    def count(path: Path) -> Any:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(images_module, "_decode", count)
    prompts = images_module.ImagePrompts(llm)
    for i in (0, 0, 1, 0, 2, 0, 1):
        await prompts._image(kept[i])
    assert [path.name for path in decoded] == [kept[i].key for i in (0, 1, 2, 1)]
