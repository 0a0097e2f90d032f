"""Prompts with images as vLLM takes them.

vLLM expands a prompt itself: it is given one token an image, the images, and a name for
each, under which it keeps their pixels and embeddings. So a prompt that has been here
before, such as that of a resumed chunk, costs neither processor nor encoder. What vLLM
has made of the prompt is compared with what aseer has counted on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from aseer.errors import EngineError, describe
from aseer.inputs.prompt_image import without_images

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from aseer.inputs.prompt_image import PromptImage
    from aseer.types import Chunk

_log = logging.getLogger("aseer.instance")

# Decoded images that are kept: vLLM wants them with every prompt, and looks at them
# only if it has not kept what it made of them.
_MAX_DECODED_BYTES = 512 << 20
# The first makes vLLM forget what it took for kept, and the second brings it again; one
# more is for what another request pushed out in between.
_MAX_ATTEMPTS = 3


def _limits(llm: Any) -> tuple[int, int]:
    """The most images of a prompt, and the token that stands for one; 0, -1 = none."""
    config = llm.vllm_config.model_config
    token = getattr(config.hf_config, "image_token_id", None)
    renderer: Any = getattr(llm, "renderer", None)
    if token is None or not getattr(config, "is_multimodal_model", False):
        return 0, -1
    if not hasattr(renderer, "render_cmpl_async"):
        _log.warning("this release of vLLM takes no images from aseer: update it")
        return 0, -1
    limits: Mapping[str, int] = renderer.get_mm_processor().info.allowed_mm_limits
    most = int(limits.get("image", 0))
    return (most, int(token)) if most else (0, -1)


class ImagePrompts:
    """Makes the engine's inputs of chunks whose prompts have images.

    Attributes:
        max_images, image_token_id: as `InstanceInfo` has them.
    """

    def __init__(self, llm: Any) -> None:
        """Prepare for the engine's model."""
        self._llm = llm
        self.max_images, self.image_token_id = _limits(llm)
        self._decoded: OrderedDict[str, Image.Image] = OrderedDict()
        self._num_bytes = 0

    async def generate(
        self,
        chunk: Chunk,
        inputs: list[int],
        salt: str,
        params: Any,
        request_id: str,
        lora: Any,
    ) -> AsyncIterator[Any]:
        """What the engine generates; see `_render` for the arguments and errors.

        Half of vLLM's cache of images is in this process, and tells what need not be
        sent to the other half, in the engine's. Where the two differ, the request ends
        as an error before it begins, and is made again.
        """
        for attempt in range(_MAX_ATTEMPTS):
            prompt = await self._render(chunk, inputs, salt)
            has_begun = attempt == _MAX_ATTEMPTS - 1
            outputs = self._llm.generate(prompt, params, request_id, lora_request=lora)
            async for output in outputs:
                if not has_begun and output.outputs[0].finish_reason == "error":
                    break
                has_begun = True
                yield output
            if has_begun:
                return

    async def _render(self, chunk: Chunk, inputs: list[int], salt: str) -> Any:
        """The engine's input.

        Args:
            inputs: the chunk's prompt and what was generated, expanded.
            salt: of the keys of its KV.

        Raises:
            EngineError: an image is not there, or vLLM makes another number of tokens
                of it than were counted.
        """
        images = [await self._image(image) for image in chunk.images]
        keys = [image.key for image in chunk.images]
        prompt = {
            "prompt_token_ids": without_images(
                chunk.prompt + chunk.generated, chunk.images
            ).tolist(),
            "multi_modal_data": {"image": images},
            "multi_modal_uuids": {"image": keys},
            "cache_salt": salt,
        }
        (rendered,) = await self._llm.renderer.render_cmpl_async([prompt])
        if rendered["prompt_token_ids"] != inputs:
            raise EngineError(
                f"vLLM makes {len(rendered['prompt_token_ids'])} tokens of a prompt "
                f"with images that was counted to have {len(inputs)}: the model's "
                "processor in vLLM is another one than in transformers, or has other "
                "settings"
            )
        return rendered

    async def _image(self, image: PromptImage) -> Image.Image:
        decoded = self._decoded.get(image.key)
        if decoded is None:
            try:
                decoded = await asyncio.to_thread(_decode, Path(image.path))
            except OSError as error:
                raise EngineError(
                    f"an image cannot be read: {describe(error)}"
                ) from error
            if image.key not in self._decoded:
                self._num_bytes += _size(decoded)
            self._decoded[image.key] = decoded
        self._decoded.move_to_end(image.key)
        while self._num_bytes > _MAX_DECODED_BYTES and len(self._decoded) > 1:
            _, oldest = self._decoded.popitem(last=False)
            self._num_bytes -= _size(oldest)
        return decoded


def _decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def _size(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())
