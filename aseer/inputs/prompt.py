"""A group's prompt as token ids, from ids, a text or a chat, with its images.

Prompts with images come in three forms, and are told apart by counting. *Messages* have
images as content parts. *Unexpanded* ids or texts have one token an image, as a model's
processor is given them; trainers have *expanded* ids, in which an image is as many
tokens as the model makes of it. Everything behind this module counts expanded tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple

from aseer.errors import ConfigError
from aseer.inputs.images import ImageStore, Picture, read_image
from aseer.inputs.plain import INT32_MAX, as_int, as_list, as_text, can_be_sent

if TYPE_CHECKING:
    from aseer.inputs.prompt_image import PromptImage
    from aseer.inputs.tokenizer import Tokenizer
    from aseer.types import InstanceInfo

# Arguments of `apply_chat_template` that aseer sets itself.
_OWN_TEMPLATE_SETTINGS = frozenset(
    {"conversation", "tools", "tokenize", "return_dict", "return_tensors"}
    | {"padding", "truncation", "max_length", "tokenizer_kwargs"}
)
# Content parts that are an image, and where each keeps it.
_IMAGE_PARTS = ("image", "image_url")


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
        ids: an image is as many tokens as it takes.
        images: in the order of their places in it.
    """

    ids: Sequence[int]
    images: tuple[PromptImage, ...] = ()


class PromptEncoder:
    """Encodes prompts for one model, and checks them against its limits."""

    def __init__(
        self, info: InstanceInfo, tokenizer: Tokenizer, store: ImageStore | None
    ) -> None:
        """Prepare; without a `store` no prompt may have images."""
        self._info = info
        self._tokenizer = tokenizer
        self._store = store

    @property
    def num_ids(self) -> int:
        """Token ids are below it."""
        return self._info.vocab_size or INT32_MAX + 1

    def encode(
        self,
        prompt: object,
        *,
        images: object = None,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A prompt as `Group` takes it.

        Raises:
            ConfigError: it is none, or not one that the model can read.
        """
        _check_template(tools, template_kwargs)
        text = as_text(prompt)
        items = _items(prompt) if text is None else []
        given = _given_images(images)
        if items and all(isinstance(m, Mapping) for m in items):
            messages, given = _take_images(items, given)
            ids = self._encode_chat(messages, tools, template_kwargs)
        elif tools or template_kwargs:
            raise ConfigError(
                "its tools and chat_template_kwargs are for the chat template, and its "
                "prompt is no list of chat messages; leave them out, or give messages"
            )
        elif not text:
            ids = self._check_ids(items)
        elif can_be_sent(text):
            ids = self._check_ids(self._tokenizer.encode_text(text))
        else:
            raise ConfigError(f"its prompt is no valid Unicode: {text!r:.100}")
        if not ids:
            raise ConfigError("its prompt is empty; give at least one token")
        if given:
            return self._with_images(ids, given)
        if self._info.max_images and self._info.image_token_id in ids:
            raise ConfigError(
                f"its prompt has the token {self._info.image_token_id}, which stands "
                "for an image, and no images; give Group(prompt, images=[...])"
            )
        return Prompt(ids)

    def _encode_chat(
        self,
        messages: list[Any],
        tools: Sequence[Any] | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> list[int]:
        settings = template_kwargs or {}
        own = sorted(_OWN_TEMPLATE_SETTINGS & set(settings))
        if own:
            raise ConfigError(
                f"chat_template_kwargs has {own}, which aseer sets itself; leave them "
                "out (tools are Group(tools=...))"
            )
        encode = self._tokenizer.encode_chat
        return self._check_ids(encode(messages, tools=tools, template_kwargs=settings))

    def _check_ids(self, items: list[Any]) -> list[int]:
        limit = self.num_ids
        ids = items if set(map(type, items)) <= {int} else list(map(_token_id, items))
        if ids and not 0 <= min(ids) <= max(ids) < limit:
            wrong = next(i for i in ids if not 0 <= i < limit)
            raise ConfigError(
                f"its prompt has token id {wrong}; this model's are 0 to {limit - 1}"
            )
        return ids

    def _with_images(self, ids: list[int], given: list[Any]) -> Prompt:
        allowed = self._info.max_images
        if self._store is None:
            raise ConfigError(
                f"it has {len(given)} images, which are kept in this machine's memory, "
                "and the engine has instances on other hosts, which cannot read them; "
                "run models that see on one machine"
            )
        if not allowed:
            raise ConfigError(
                f"it has {len(given)} images, and this model takes none; leave them "
                "out, or take a model that sees"
            )
        if len(given) > allowed:
            raise ConfigError(
                f"it has {len(given)} images, and a prompt of this engine may have "
                f"{allowed}; raise EngineConfig(engine_args={{'limit_mm_per_prompt': "
                "{'image': ...}})"
            )
        pictures = []
        for i, each in enumerate(given):
            try:
                pictures.append(read_image(each))
            except ConfigError as error:
                raise ConfigError(f"images[{i}]: {error}") from error.__cause__
        sizes = [(picture.height, picture.width) for picture in pictures]
        counts = self._tokenizer.count_image_tokens(sizes)
        expanded, starts = place_images(ids, self._info.image_token_id, counts)
        return Prompt(expanded, _kept(self._store, pictures, starts, counts))


def place_images(
    ids: Sequence[int], image_token: int, counts: Sequence[int]
) -> tuple[array[int], list[int]]:
    """The expanded prompt, and where each image begins in it.

    Args:
        ids: one `image_token` an image, or as many as each takes.
        counts: tokens that each image takes.

    Raises:
        ConfigError: it has another number of them.
    """
    given = array("i", ids)
    num_given, num_images = given.count(image_token), len(counts)
    is_expanded = num_given == sum(counts)
    if not is_expanded and num_given != num_images:
        raise ConfigError(
            f"its prompt has the token {image_token}, which stands for an image, "
            f"{num_given} times for {num_images} images; give it once an image, or as "
            f"often as the model's processor does ({_sum_of(counts)})"
        )
    expanded, starts, place = array("i"), [], 0
    for count in counts:
        start = given.index(image_token, place)
        run = array("i", [image_token]) * count
        expanded += given[place:start]
        starts.append(len(expanded))
        expanded += run
        place = start + (count if is_expanded else 1)
        if is_expanded and given[start:place] != run:
            raise ConfigError(
                f"its prompt has the token {image_token}, which stands for an image, "
                f"as often as its images take ({_sum_of(counts)}), but not in a row "
                f"for each: image {len(starts) - 1} begins at {start} and has "
                f"{count}; give each its own, in the order of the images"
            )
    return expanded + given[place:], starts


def _sum_of(counts: Sequence[int]) -> str:
    terms = " + ".join(map(str, counts))
    return terms if len(counts) == 1 else f"{terms} = {sum(counts)}"


def _kept(
    store: ImageStore,
    pictures: Sequence[Picture],
    starts: Sequence[int],
    counts: Sequence[int],
) -> tuple[PromptImage, ...]:
    try:
        return tuple(map(store.keep, pictures, starts, counts))
    except OSError as error:
        raise ConfigError(
            f"its images cannot be kept for the engines ({error}); there must be room "
            "in /dev/shm, or give EngineConfig(weights_dir=...)"
        ) from error


def _check_template(tools: object, template_kwargs: object) -> None:
    if not (template_kwargs is None or isinstance(template_kwargs, Mapping)):
        raise ConfigError(
            f"chat_template_kwargs={template_kwargs!r:.100} is not allowed; give a "
            "mapping"
        )
    is_text = isinstance(tools, str | bytes | bytearray)
    if tools is not None and (is_text or not isinstance(tools, Sequence)):
        raise ConfigError(
            f"tools={tools!r:.100} is not allowed; give a list of functions, or of "
            "JSON schemas of functions"
        )


def _given_images(images: object) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, str | bytes | bytearray | Mapping | Set):
        items = None
    elif getattr(images, "shape", None) is not None or not isinstance(images, Sequence):
        items = None  # one array is one image
    else:
        items = list(images)
    if items is None:
        raise ConfigError(
            f"images is a {type(images).__name__}; give a list of images, such as "
            "[image]"
        )
    return items


def _take_images(
    messages: list[Any], given: list[Any]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with bare image parts, as templates take them, and the images.

    A part has its image, or leaves it to `Group.images`, in order.
    """
    rest = iter(given)
    images: list[Any] = []
    bare = []
    for message in messages:
        if "role" not in message or "content" not in message:
            raise ConfigError(
                f"chat message {message!r:.100} has no 'role' or no 'content'"
            )
        content = message["content"]
        if isinstance(content, str) or not isinstance(content, Sequence):
            bare.append(message)
            continue
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "video":
                raise ConfigError("it has a video, and only images are taken")
            if kind not in _IMAGE_PARTS:
                parts.append(part)
                continue
            images.append(_image_of(part, kind, rest))
            parts.append({"type": "image"})
        bare.append({**message, "content": parts})
    num_left = sum(1 for _ in rest)
    if num_left:
        raise ConfigError(
            f"it has {len(given)} images, and its messages have {len(given) - num_left}"
            " content parts without one; give as many {'type': 'image'} parts as images"
        )
    return bare, images


def _image_of(part: Mapping[str, Any], kind: str, rest: Any) -> Any:
    image = part.get(kind)
    if isinstance(image, Mapping):  # as OpenAI has it
        image = image.get("url")
    if image is None:
        image = next((part[k] for k in ("url", "path") if part.get(k)), None)
    if image is None:
        image = next(rest, None)
    if image is None:
        raise ConfigError(
            "its messages have more content parts for images than there are images; "
            "give Group(prompt, images=[...]), or {'type': 'image', 'image': ...}"
        )
    return image


def _token_id(item: object) -> int:
    token = as_int(item)
    if token is None:
        raise ConfigError(
            f"its prompt has {item!r:.100} where a token id is expected; a prompt is "
            "token ids, a text, or chat messages"
        )
    return token


def _items(prompt: object) -> list[Any]:
    shape = getattr(prompt, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ConfigError(
            f"its prompt is an array of shape {tuple(shape)}; give the token ids of "
            "one prompt, such as prompt[0]"
        )
    items = None if isinstance(prompt, Set) else as_list(prompt)
    if items is not None:
        return items
    if shape is not None:
        raise ConfigError(
            "its prompt is a tensor without values (of the device 'meta', or fake); "
            "give token ids, a text, or chat messages"
        )
    hint = ", such as prompt['input_ids']" if isinstance(prompt, Mapping) else ""
    raise ConfigError(
        f"its prompt is a {type(prompt).__name__}; give token ids{hint}, a text, or "
        "chat messages"
    )
