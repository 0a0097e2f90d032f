"""Texts and chats as token ids, by the tokenizer that the engines load."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from aseer.errors import ConfigError, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aseer.config import EngineConfig

_log = logging.getLogger("aseer")

# A tokenizer on this machine's disk takes a second or two. The hub's library tries
# again and again for half a minute, without a word, where the hub does not answer.
_LONG_LOAD_S = 5.0

Message = Mapping[str, Any]

# vLLM's tokenizer modes that are transformers' tokenizer and the model's template.
_HUGGING_FACE_MODES = ("auto", "hf", "slow")


class Tokenizer(Protocol):
    """What a group with a text or chat prompt needs."""

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the reply.

        Of an image, for which its content has a part {"type": "image"}, there is one.
        """
        ...

    def count_image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens that images of these heights and widths take in a prompt."""
        ...


class HuggingFaceTokenizer:
    """The model's tokenizer, loaded when a text or chat prompt first needs it.

    It is the one that the engines load: what `engine_args` say of it counts here, too.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Prepare; nothing is loaded yet."""
        self._name = config.tokenizer or str(config.model)
        self._model = str(config.model)
        self._args = config.engine_args
        self._loaded: Any = None
        self._processor: Any = None

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> Any:
        args = self._args
        mode = args.get("tokenizer_mode", "auto")
        if mode not in _HUGGING_FACE_MODES:
            raise ConfigError(
                f"tokenizer_mode={mode!r} is vLLM's own, and texts are encoded outside "
                "of it; give token ids"
            )
        try:
            from transformers import AutoTokenizer

            with _told_if_long(self._name):
                return AutoTokenizer.from_pretrained(
                    self._name,
                    revision=args.get("tokenizer_revision") or args.get("revision"),
                    use_fast=mode != "slow",
                    **self._access,
                )
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(
                f"the tokenizer {self._name!r} for its text cannot be loaded "
                f"({error}); set EngineConfig.tokenizer or engine_args, or give token "
                "ids"
            ) from error

    @property
    def _access(self) -> dict[str, Any]:
        return {
            # Never None, for which transformers asks on the terminal, and waits.
            "trust_remote_code": bool(self._args.get("trust_remote_code")),
            "token": self._args.get("hf_token"),
        }

    def count_image_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """By the model's processor, which needs only their sizes for it."""
        try:
            if self._processor is None:
                self._processor = self._load_processor()
            counted = self._processor._get_num_multimodal_tokens(image_sizes=sizes)
            return [int(num) for num in counted["num_image_tokens"]]
        except Exception as error:  # of a processor's own code, or there is none
            raise ConfigError(
                "the tokens of its images cannot be counted by the processor of "
                f"{self._model!r} ({describe(error)}); only models whose processor in "
                "transformers counts them by an image's size take images, and most of "
                "those need torchvision"
            ) from error

    def _load_processor(self) -> Any:
        from transformers import AutoProcessor

        args = self._args
        with _told_if_long(self._model):
            return AutoProcessor.from_pretrained(
                self._model,
                revision=args.get("revision"),
                **self._access,
                **(args.get("mm_processor_kwargs") or {}),
            )

    def encode_text(self, text: str) -> list[int]:
        """As vLLM encodes a completion prompt: with the model's special tokens."""
        return list(self._tokenizer.encode(text))

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """By the chat template, which brings the special tokens itself."""
        tokenizer = self._tokenizer
        settings = {"add_generation_prompt": True, **(template_kwargs or {})}
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                # Not an empty list, for which some templates speak of tools.
                tools=list(tools) if tools else None,
                tokenize=False,
                **settings,
            )
            return list(tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # there is no template, or it raises what it likes
            raise ConfigError(
                f"the chat template of {self._name!r} cannot render its messages "
                f"({error}); change them, or give a text or token ids"
            ) from error


@contextmanager
def _told_if_long(name: str) -> Iterator[None]:
    """Have the log say that a tokenizer is waited for, once its loading takes long."""

    def tell() -> None:
        _log.warning(
            "the tokenizer of %r is still being loaded after %g s; if it is not on "
            "this machine, the Hugging Face hub is slow or does not answer. Download "
            "it beforehand (`hf download %s`), give EngineConfig.tokenizer a "
            "directory, or set HF_HUB_OFFLINE=1 if the hub cannot be reached from here",
            name,
            _LONG_LOAD_S,
            name,
        )

    timer = threading.Timer(_LONG_LOAD_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
