"""Texts and chats as token ids, by the tokenizer that the engines load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aseer.errors import ConfigError

if TYPE_CHECKING:
    from aseer.config import EngineConfig

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
        """Token ids of a conversation, ready for the reply."""
        ...


class HuggingFaceTokenizer:
    """The model's tokenizer, loaded when a text or chat prompt first needs it.

    It is the one that the engines load: what `engine_args` say of it counts here, too.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Prepare; nothing is loaded yet."""
        self._name = str(config.tokenizer or config.model)
        self._args = config.engine_args
        self._loaded: Any = None

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

            return AutoTokenizer.from_pretrained(
                self._name,
                revision=args.get("tokenizer_revision") or args.get("revision"),
                # Never None, for which transformers asks on the terminal, and waits.
                trust_remote_code=bool(args.get("trust_remote_code")),
                token=args.get("hf_token"),
                use_fast=mode != "slow",
            )
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(
                f"the tokenizer {self._name!r} for its text cannot be loaded "
                f"({error}); set EngineConfig.tokenizer or engine_args, or give token "
                "ids"
            ) from error

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
