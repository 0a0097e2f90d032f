"""Groups as users give them, checked and turned into tasks for the core."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Protocol

from aseer.errors import ConfigError
from aseer.sampling import SamplingParams, resolve_sampling
from aseer.types import GroupId, Task

if TYPE_CHECKING:
    from aseer.config import EngineConfig
    from aseer.types import InstanceInfo

Message = Mapping[str, Any]

# vLLM's tokenizer modes that are transformers' tokenizer and the model's template.
_HUGGING_FACE_MODES = ("auto", "hf", "slow")


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and how many responses to sample for it.

    Attributes:
        prompt: token ids, a text, or chat messages (rendered with the model's own chat
            template, with the generation prompt added).
        n: responses to sample (the group's size).
        sampling: `aseer.SamplingParams`, a dict of its fields, or a
            `vllm.SamplingParams`; None = the engine's.
        group_id: unique within the rollout; None = "group-<position>".
        metadata: comes back untouched with every Response.
        known_lengths: true lengths of the n responses where they are known beforehand;
            used only by the policy "longest-first", which needs them.
    """

    prompt: Sequence[int] | str | Sequence[Message]
    n: int = 8
    sampling: SamplingParams | Mapping[str, Any] | object | None = None
    group_id: str | None = None
    metadata: Any = None
    known_lengths: Sequence[int] | None = None


class Tokenizer(Protocol):
    """What a group with a text or chat prompt needs."""

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
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

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """By the chat template, which brings the special tokens itself."""
        tokenizer = self._tokenizer
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # there is no template, or it raises what it likes
            raise ConfigError(
                f"the chat template of {self._name!r} cannot render its messages "
                f"({error}); change them, or give a text or token ids"
            ) from error
        return list(tokenizer.encode(text, add_special_tokens=False))


class GroupResolver:
    """Checks a rollout's groups and makes tasks of them."""

    def __init__(
        self,
        info: InstanceInfo,
        tokenizer: Tokenizer,
        default: SamplingParams,
        *,
        speculating: bool = False,
        needs_lengths: bool = False,
    ) -> None:
        """Check against what the engines said of themselves (`info`)."""
        self._speculating = speculating
        self._needs_lengths = needs_lengths
        self._info = info
        self._tokenizer = tokenizer
        self._default = default
        self._seen: set[str] = set()

    def resolve(self, group: Group) -> Task:
        """The group as a task.

        Raises:
            ConfigError: it cannot run; names the group, the value and what is allowed.
        """
        if not isinstance(group, Group):
            raise ConfigError(
                f"a group is an aseer.Group, not {type(group).__name__}: {group!r:.100}"
            )
        group_id = self._group_id(group)
        try:
            task = self._resolve(group, group_id)
        except ConfigError as error:
            raise ConfigError(f"group {group_id!r}: {error}") from None
        self._seen.add(group_id)
        return task

    def _group_id(self, group: Group) -> GroupId:
        if group.group_id is None:
            return GroupId(f"group-{len(self._seen)}")
        group_id = str(group.group_id)
        if group_id in self._seen:
            raise ConfigError(
                f"group_id {group_id!r} is in this rollout twice; ids must be unique "
                "(leave it out to have one made)"
            )
        return GroupId(group_id)

    def _resolve(self, group: Group, group_id: GroupId) -> Task:
        if isinstance(group.n, bool) or not isinstance(group.n, int) or group.n < 1:
            raise ConfigError(f"n={group.n!r} is not allowed; give an int >= 1")
        lengths = self._check_lengths(group)
        sampling = resolve_sampling(group.sampling, default=self._default)
        if self._speculating:
            self._check_speculation(sampling)
        prompt = self._encode(group.prompt)
        room = self._info.max_model_len - len(prompt)
        if room < 1:
            raise ConfigError(
                f"its prompt of {len(prompt)} tokens leaves no room in "
                f"max_model_len={self._info.max_model_len}; shorten it, or raise the "
                "limit"
            )
        max_tokens = min(room, sampling.max_tokens or room)
        if sampling.min_tokens > max_tokens:
            raise ConfigError(
                f"min_tokens={sampling.min_tokens} is more than the {max_tokens} "
                f"tokens that fit behind its prompt of {len(prompt)}"
            )
        return Task(
            group_id=group_id,
            num_requests=group.n,
            prompt=array("i", prompt).tobytes(),
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            min_tokens=sampling.min_tokens,
            seed=sampling.seed,
            sampling=sampling.to_dict(),
            undivided_because=sampling.undivided_because(),
            known_lengths=lengths,
            metadata=group.metadata,
        )

    def _check_lengths(self, group: Group) -> list[int] | None:
        given = group.known_lengths
        if given is None:
            if self._needs_lengths:
                raise ConfigError(
                    "the policy 'longest-first' orders requests by known_lengths, and "
                    "it has none; give them, or take 'context-aware', which needs none"
                )
            return None
        try:
            lengths = [index(length) for length in given]
        except TypeError:
            raise ConfigError(
                f"known_lengths={given!r:.100} is not allowed; give {group.n} ints"
            ) from None
        if len(lengths) != group.n:
            raise ConfigError(
                f"known_lengths has {len(lengths)} entries for n={group.n}"
            )
        return lengths

    def _check_speculation(self, sampling: SamplingParams) -> None:
        for name, is_set in (
            ("min_p", sampling.min_p > 0),
            ("logit_bias", sampling.logit_bias is not None),
        ):
            if is_set:
                raise ConfigError(
                    f"sampling sets {name}, which vLLM refuses while it speculates; "
                    'leave it out, or set EngineConfig(speculation="off")'
                )

    def _encode(self, prompt: object) -> list[int]:
        if isinstance(prompt, str):
            tokens = self._tokenizer.encode_text(prompt) if prompt else []
        else:
            items = _as_list(prompt)
            if items and all(isinstance(m, Mapping) for m in items):
                tokens = self._encode_chat(items)
            else:
                tokens = self._check_ids(items)
        if not tokens:
            raise ConfigError("its prompt is empty; give at least one token")
        return tokens

    def _encode_chat(self, messages: list[Any]) -> list[int]:
        for message in messages:
            if "role" not in message or "content" not in message:
                raise ConfigError(
                    f"chat message {message!r:.100} has no 'role' or no 'content'"
                )
        return self._tokenizer.encode_chat(messages)

    def _check_ids(self, items: list[Any]) -> list[int]:
        limit = self._info.vocab_size or 1 << 31
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise ConfigError(
                    f"its prompt has {item!r:.100} where a token id is expected; a "
                    "prompt is token ids, a text, or chat messages"
                )
            if not 0 <= item < limit:
                raise ConfigError(
                    f"its prompt has token id {item}; this model's are 0 to {limit - 1}"
                )
        return items


def _as_list(prompt: object) -> list[Any]:
    tolist = getattr(prompt, "tolist", None)  # numpy arrays and tensors
    if tolist is not None:
        prompt = tolist()
    if isinstance(prompt, Sequence):
        return list(prompt)
    raise ConfigError(
        f"its prompt is a {type(prompt).__name__}; give token ids, a text, or chat "
        "messages"
    )
