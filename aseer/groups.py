"""Groups as users give them, checked and turned into tasks for the core."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from aseer.errors import ConfigError
from aseer.inputs.plain import INT32_MAX, as_int, as_list, as_text, can_be_sent
from aseer.inputs.prompt import PromptEncoder
from aseer.sampling import SamplingParams, resolve_sampling
from aseer.types import GroupId, Task

if TYPE_CHECKING:
    from aseer.inputs.images import ImageStore
    from aseer.inputs.tokenizer import Message, Tokenizer
    from aseer.types import InstanceInfo

G = TypeVar("G")
# A whole rollout is designed for a million requests, and each takes memory before it
# runs.
_MAX_GROUP_SIZE = 1_000_000


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and how many responses to sample for it.

    Attributes:
        prompt: token ids, a text, or chat messages. Messages are rendered with the
            model's own chat template, and the generation prompt is added.
        images: of a model that sees, in the order in which the prompt has them: each a
            PIL.Image, the bytes of an image file, its path, a data: URL, or an array
            [height, width, 3] of uint8. Token ids and texts have the model's image
            token once an image, or, as its processor makes them, as often as the image
            takes tokens; messages have content parts {"type": "image"}, which may also
            bring their image themselves ({"type": "image", "image": ...}).
        n: how many responses to sample (the group's size), at most a million.
        sampling: `aseer.SamplingParams`, a dict of its fields, or a
            `vllm.SamplingParams`; None = the engine's.
        group_id: a text, unique within the rollout; None = an id such as
            "group-<position>" is made.
        metadata: comes back untouched with every Response.
        known_lengths: the lengths that the n responses will have, where somebody knows
            them beforehand; used only by the policy "longest-first", which needs them.
        chat_template_kwargs: arguments of the chat template, such as
            {"enable_thinking": False}.
        tools: functions, or JSON schemas of functions, for the chat template.
    """

    prompt: Sequence[int] | str | Sequence[Message]
    n: int = 8
    sampling: SamplingParams | Mapping[str, Any] | object | None = None
    group_id: str | None = None
    metadata: Any = None
    known_lengths: Sequence[int] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[Any] | None = None
    images: Sequence[Any] | None = None


#: What a rollout takes its groups from.
Groups = Iterable[Group] | AsyncIterable[Group]


def check_groups(groups: G) -> G:
    """Return what a rollout was given, if it can be a source of groups.

    Raises:
        ConfigError: it cannot; the message says what to give.
    """
    is_source = isinstance(groups, Iterable | AsyncIterable) or hasattr(
        groups, "__getitem__"
    )
    is_one = isinstance(groups, Group | str | bytes | Mapping)
    # numpy's numbers and arrays of one say that they can be iterated.
    if is_source and not is_one and getattr(groups, "shape", None) != ():
        return groups
    advice = "a list or an iterator of aseer.Group"
    if isinstance(groups, Group):
        advice = "[group], since there may be many"
    elif isinstance(groups, str):
        advice = "[aseer.Group(prompt)]"
    elif callable(groups):
        advice = "what it makes: call it"
    raise ConfigError(
        f"a rollout takes groups, not a {type(groups).__name__} ({groups!r:.100}); "
        f"give {advice}"
    )


def check_group_id(group_id: object) -> GroupId:
    """The group's id as plain text; responses carry it, and `cancel` takes it.

    Raises:
        ConfigError: it is no text that can be sent.
    """
    text = as_text(group_id)
    if text is not None and not can_be_sent(text):
        raise ConfigError(
            f"group_id={text!r:.100} cannot be told to an engine; give valid Unicode"
        )
    if text is None:
        raise ConfigError(
            f"group_id={group_id!r:.100} is a {type(group_id).__name__}; give a str, "
            f"such as {str(group_id)!r:.100}"
        )
    return GroupId(text)


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
        image_store: ImageStore | None = None,
    ) -> None:
        """Prepare to check groups against the limits that the engines told (`info`).

        Without an `image_store` no group may have images.
        """
        self._speculating = speculating
        self._needs_lengths = needs_lengths
        self._info = info
        self._encoder = PromptEncoder(info, tokenizer, image_store)
        self._default = default
        # Whether each id was made here, or came with its group.
        self._ids: dict[GroupId, bool] = {}

    def resolve(self, group: Group) -> Task:
        """The group as a task.

        Raises:
            ConfigError: the group cannot run; the message names the group, the value
                and what is allowed.
        """
        return self.resolve_all([group])[0]

    def prepare(self, group: Group) -> Task:
        """The group as a task whose id is not taken.

        Raises:
            ConfigError: it cannot run.
        """
        group_id = GroupId("") if group.group_id is None else GroupId(group.group_id)
        return self._resolve(group, group_id)

    def has_made(self, group_id: GroupId) -> bool:
        """Whether the id was made here, and not given."""
        return self._ids[group_id]

    def resolve_all(self, groups: Iterable[Group]) -> list[Task]:
        """All groups as tasks, or none: if one is refused, no id is taken.

        Ids that are made here differ from those that other groups of the list bring.

        Raises:
            ConfigError: a group cannot run; the message names the group, the value and
                what is allowed.
        """
        groups = list(groups)
        given = {g.group_id for g in groups if isinstance(g, Group) and _has_id(g)}
        new_ids: dict[GroupId, bool] = {}
        tasks = []
        for group in groups:
            if not isinstance(group, Group):
                raise ConfigError(
                    f"a group is an aseer.Group, not {type(group).__name__}: "
                    f"{group!r:.100}"
                )
            is_made = group.group_id is None
            if is_made:
                group_id = self._make_id(new_ids, given)
            else:
                group_id = self._check_id(group.group_id, new_ids)
            try:
                tasks.append(self._resolve(group, group_id))
            except ConfigError as error:
                raise ConfigError(f"group {group_id!r}: {error}") from None
            new_ids[group_id] = is_made
        self._ids |= new_ids
        return tasks

    def _make_id(
        self, new_ids: Mapping[GroupId, bool], given: Set[str | None]
    ) -> GroupId:
        position = len(self._ids) + len(new_ids)
        made = GroupId(f"group-{position}")
        attempt = 1
        while made in self._ids or made in new_ids or made in given:
            attempt += 1
            made = GroupId(f"group-{position}-{attempt}")
        return made

    def _check_id(self, given: object, new_ids: Mapping[GroupId, bool]) -> GroupId:
        group_id = check_group_id(given)
        was_made = new_ids.get(group_id, self._ids.get(group_id))
        if was_made is None:
            return group_id
        if was_made:
            raise ConfigError(
                f"group_id {group_id!r} was made for an earlier group of this rollout "
                "that brought none; give every group an id, or none"
            )
        raise ConfigError(
            f"group_id {group_id!r} is in this rollout twice; ids must be unique "
            "(leave it out to have one made)"
        )

    def _resolve(self, group: Group, group_id: GroupId) -> Task:
        num_requests = as_int(group.n)
        if num_requests is None or not 1 <= num_requests <= _MAX_GROUP_SIZE:
            raise ConfigError(
                f"n={group.n!r:.100} is not allowed; give an int from 1 to "
                f"{_MAX_GROUP_SIZE}"
            )
        lengths = self._check_lengths(group.known_lengths, num_requests)
        sampling = resolve_sampling(group.sampling, default=self._default)
        if self._speculating:
            self._check_speculation(sampling)
        self._check_vocabulary(sampling)
        prompt, images = self._encoder.encode(
            group.prompt,
            images=group.images,
            tools=group.tools,
            template_kwargs=group.chat_template_kwargs,
        )
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
        settings = sampling.to_dict()
        _check_sendable({"group_id": group_id} | settings)
        return Task(
            group_id=group_id,
            num_requests=num_requests,
            prompt=array("i", prompt).tobytes(),
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            min_tokens=sampling.min_tokens,
            seed=sampling.seed,
            sampling=settings,
            undivided_because=sampling.undivided_because(),
            known_lengths=lengths,
            metadata=group.metadata,
            images=images,
        )

    def _check_lengths(
        self, given: Sequence[int] | None, num_requests: int
    ) -> list[int] | None:
        if given is None:
            if self._needs_lengths:
                raise ConfigError(
                    "the policy 'longest-first' orders requests by known_lengths, and "
                    "it has none; give them, or take 'context-aware', which needs none"
                )
            return None
        items = None if isinstance(given, Set) else as_list(given)
        lengths = [as_int(item) for item in items or ()]
        if items is None or not all(_is_length(length) for length in lengths):
            raise ConfigError(
                f"known_lengths={given!r:.100} is not allowed; give {num_requests} "
                f"ints from 0 to {INT32_MAX}"
            )
        if len(lengths) != num_requests:
            raise ConfigError(
                f"known_lengths has {len(lengths)} entries for n={num_requests}"
            )
        return [length for length in lengths if length is not None]

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

    def _check_vocabulary(self, sampling: SamplingParams) -> None:
        limit = self._encoder.num_ids
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            highest = max(getattr(sampling, name) or (0,))
            if highest >= limit:
                raise ConfigError(
                    f"sampling {name} has token id {highest}; this model's are 0 to "
                    f"{limit - 1}"
                )


def _has_id(group: Group) -> bool:
    return isinstance(group.group_id, str)


def _is_length(length: int | None) -> bool:
    return length is not None and 0 <= length <= INT32_MAX


def _check_sendable(settings: Mapping[str, Any]) -> None:
    """Refuse what a chunk's message could not carry, such as a lone surrogate."""
    try:
        msgspec.msgpack.encode(settings)
    except (TypeError, ValueError, OverflowError):
        for name, value in settings.items():
            try:
                msgspec.msgpack.encode(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(
                    f"{name}={value!r:.100} cannot be told to an engine ({error}); "
                    "give plain numbers and valid Unicode"
                ) from None
