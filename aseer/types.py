"""The words the core is written in: ids, states, and what passes between its parts.

All of it is plain data. Token ids are 32-bit, logprobs float32, as engines compute.
Times are seconds of one monotonic clock whose zero is the rollout's start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence  # noqa: TC003  # for msgspec, too
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, NewType

from aseer.counts import DraftCounts, KvCounts  # noqa: TC001
from aseer.inputs.prompt_image import PromptImage  # noqa: TC001

GroupId = NewType("GroupId", str)
RequestId = NewType("RequestId", str)
InstanceId = NewType("InstanceId", int)
ChunkId = NewType("ChunkId", int)

FinishReason = Literal["stop", "length", "aborted", "error"]


class RequestState(StrEnum):
    """Where a request is in its life; the FINISHED states are final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH_CAPPED = "length"
    FINISHED_ABORTED = "aborted"
    FINISHED_ERROR = "error"

    def __init__(self, value: str) -> None:
        self.is_finished = value not in ("waiting", "running")
        self.is_whole = value in ("stop", "length")  # it ran to its end


def request_id_of(group_id: GroupId, index: int) -> RequestId:
    """The id of a group's member."""
    return RequestId(f"{group_id}/{index}")


class KvGroup(NamedTuple):
    """Layers of a model that keep KV alike, in blocks of their own for each request.

    Attributes:
        block_size: tokens a block holds.
        max_blocks: the most that a request needs at once, since a sliding window or a
            recurrent state leaves older tokens behind; None = it keeps all its tokens.
        num_extra_blocks: that a request has besides, for states of drafted tokens.
    """

    block_size: int
    max_blocks: int | None = None
    num_extra_blocks: int = 0

    def blocks_for(self, num_tokens: int) -> int:
        """KV blocks that so many tokens of one request occupy at most."""
        needed = -(-num_tokens // self.block_size)
        if self.max_blocks is not None:
            needed = min(needed, self.max_blocks)
        return needed + self.num_extra_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceInfo:
    """What an instance says of itself in its hello.

    Attributes:
        num_kv_blocks: blocks that requests can use (vLLM's null block is not counted).
        block_size: KV is found again up to multiples of so many tokens. Where there is
            one kind of layer, it is what a KV block holds.
        max_num_seqs: requests it runs at once.
        max_model_len: prompt and generated tokens a request may have together.
        num_lookahead_tokens: KV slots past a request's last token that one step may
            write (draft tokens), 0 without speculation.
        shares_prompts: running requests that begin alike share KV (prefix caching).
        keeps_kv: the next chunk of a request finds the KV of the last one there, unless
            others needed the room (prefix caching).
        vocab_size: token ids a prompt may use are below it; 0 = unknown.
        kv_groups: where a model's layers differ in what they keep, its groups: all take
            blocks out of the same `num_kv_blocks`. Empty = one group that keeps every
            token in blocks of `block_size`.
        kv_world_size: pieces that a token's KV is split into, as a KV pool counts them.
        why_no_pool: why it takes no part in the KV pool that it was told of, or "".
        node: name of the (leading) host that it runs on; "" = the controller's.
        max_images: the most that a prompt may have; 0 = the model takes none.
        image_token_id: a prompt has it for each token of an image; -1 = none is.
    """

    instance_id: InstanceId
    num_kv_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    num_lookahead_tokens: int = 0
    shares_prompts: bool = False
    keeps_kv: bool = True
    vocab_size: int = 0
    model: str = ""
    dtype: str = ""
    device: str = ""
    engine_version: str = ""
    pid: int = 0
    kv_groups: tuple[KvGroup, ...] = ()
    kv_world_size: int = 1
    why_no_pool: str = ""
    node: str = ""
    max_images: int = 0
    image_token_id: int = -1

    def blocks_for(self, num_tokens: int) -> int:
        """KV blocks that `num_tokens` tokens of one request occupy at most."""
        written = num_tokens + self.num_lookahead_tokens
        needed = sum(group.blocks_for(written) for group in self._groups)
        return min(needed, self.num_kv_blocks)

    def shared_blocks_for(self, num_tokens: int) -> int:
        """Of a request's blocks, those that hold nothing but its first tokens.

        Siblings that begin alike share them while they run. What a window or a state
        leaves behind is shared by nobody for long, and not counted.
        """
        lasting = (g.block_size for g in self._groups if g.max_blocks is None)
        return sum(num_tokens // block_size for block_size in lasting)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits at once, in requests as long as the model takes.

        Shorter ones fit fewer tokens where every request has blocks that do not grow
        with it, as those of states.
        """
        if not self.kv_groups:
            return self.num_kv_blocks * self.block_size
        written = self.max_model_len + self.num_lookahead_tokens
        each = sum(group.blocks_for(written) for group in self.kv_groups)
        return self.max_model_len * self.num_kv_blocks // max(1, each)

    @property
    def cached_blocks_each(self) -> int:
        """KV blocks that keep `block_size` tokens of a request that has ended."""
        return sum(self.block_size // group.block_size for group in self._groups)

    @property
    def _groups(self) -> tuple[KvGroup, ...]:
        return self.kv_groups or (KvGroup(self.block_size),)


class Assignment(NamedTuple):
    """One decision: this request runs its next chunk there.

    Attributes:
        num_reserved_blocks: without those of a prompt that siblings may share.
    """

    request_id: RequestId
    instance_id: InstanceId
    max_tokens: int
    num_reserved_blocks: int


@dataclass(slots=True, kw_only=True)  # not frozen: that triples the time to make one
class Chunk:
    """One dispatch of a request to an instance; nobody changes it.

    Attributes:
        prompt: [num_prompt_tokens] int32 as bytes.
        generated: tokens generated by earlier chunks, int32 as bytes.
        max_tokens: the most this chunk may generate.
        sampling: the request's settings as plain data (`SamplingParams.to_dict`).
        seed: of this chunk's random stream; None = the engine's own.
        rollout_id: tells apart groups of the same id in different rollouts.
        weight_version: of the weights it is to run with; KV of others is not found.
        images: of the prompt, in the order of their places in it.
    """

    chunk_id: ChunkId
    request_id: RequestId
    group_id: GroupId
    instance_id: InstanceId
    prompt: bytes
    generated: bytes
    max_tokens: int
    min_tokens: int
    sampling: Mapping[str, Any]
    seed: int | None
    num_reserved_blocks: int
    rollout_id: int = 0
    weight_version: int = 0
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEnd:
    """Why a chunk ended.

    `length` is the chunk's, not the request's. `stop_reason` is the token id or the
    stop string that ended a `stop`. `held_text` is text an instance keeps back in case
    it turns out to be the beginning of a stop string; it counts only if nothing
    follows.
    """

    reason: FinishReason
    stop_reason: int | str | None = None
    error: str | None = None
    held_text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkProgress:
    """New tokens of a running chunk, and its end if it is over.

    Tokens and text are two streams that only grow. A report says where in each it
    begins, so that one that is lost is noticed and one that comes twice is not taken
    twice.

    Attributes:
        start: tokens that the chunk generated before these.
        tokens: int32 as bytes; logprobs: float32 as bytes, one a token.
        text_start: bytes of the chunk's text before this, as UTF-8.
        text: what these tokens add to the response's text.
        num_cached_tokens: of the chunk's input, tokens whose KV was found; None until
            known, and then in one report only.
    """

    chunk_id: ChunkId
    start: int
    tokens: bytes = b""
    logprobs: bytes = b""
    text_start: int = 0
    text: str = ""
    num_cached_tokens: int | None = None
    end: ChunkEnd | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLoad:
    """How busy an instance's engine is, as its scheduler says.

    `num_preemptions`, `drafts` and `kv` count from the process's start; `drafts` is
    None without speculation, `kv` without a KV pool.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_used: float = 0.0
    num_preemptions: int = 0
    drafts: DraftCounts | None = None
    kv: KvCounts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """What one request went through.

    Of a response that a journal had, what it went through in the run that finished it,
    but for `finished_at_s`, which is of this rollout; of one that a journal had a part
    of, what it went through in this rollout.

    Attributes:
        queue_s: time spent waiting for a place. run_s: time spent in chunks.
        finished_at_s: since the rollout's start.
        instances: instance of each chunk, in order.
        num_cached_tokens: tokens whose KV was found when a chunk started, over all
            chunks.
        num_recomputed_tokens: tokens whose KV had been computed before and was again.
    """

    queue_s: float
    run_s: float
    finished_at_s: float
    num_chunks: int
    num_migrations: int
    num_retries: int
    instances: list[int]
    num_cached_tokens: int
    num_recomputed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One finished request.

    Attributes:
        prompt_token_ids: as the model reads them: an image is as many tokens as it
            takes.
        unexpanded_prompt_token_ids: with one token an image, as the model's processor
            is given them; None for a prompt without images.
        logprobs: float32 values, one a token: the logprob of the sampled token under
            the distribution it was drawn from (after temperature, top-p, top-k and
            penalties). All are finite: a token for which an engine says anything else
            (NaN, or -inf, which no token that was drawn can have) is not delivered, and
            its request ends as an `error`.
        text: decoded tokens, without the stop string (unless asked for) and without
            special tokens (unless asked for).
        finish_reason: `stop` (an end token or a stop string), `length` (max_tokens or
            the model's length), `aborted` (cancelled), `error`.
        stop_reason: the token id or string that stopped it; None if nothing did.
        weight_version: of the weights every token was sampled with.
        replayed: it was finished in an earlier run, and came out of a journal.
    """

    group_id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None
    weight_version: int
    metrics: RequestMetrics
    metadata: Any = None
    error: str | None = None
    replayed: bool = False
    unexpanded_prompt_token_ids: list[int] | None = None

    @property
    def request_id(self) -> str:
        return request_id_of(GroupId(self.group_id), self.index)


class GroupKey(NamedTuple):
    """What tells a group from others in every run of its rollout.

    Attributes:
        group_id: that the user gave; empty = the group is told by its content alone.
        prompt, settings: digests of what decides how its responses are sampled.
        occurrence: groups of the same content, and without an id, that came before.
    """

    group_id: str
    prompt: bytes
    settings: bytes
    num_requests: int
    occurrence: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a request had generated when an earlier run of its rollout broke off.

    Attributes:
        tokens: int32 as bytes; logprobs: float32 as bytes, one a token; text: UTF-8.
        held_text: text that counts only if nothing follows; see `ChunkEnd`.
        finish_reason: None = the request is not finished, and goes on.
        metrics: of a finished request.
    """

    tokens: bytes
    logprobs: bytes
    text: bytes
    held_text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    metrics: RequestMetrics | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A validated group: what the core is given.

    Attributes:
        prompt: [num_prompt_tokens] int32 as bytes, shared by the members.
        max_tokens: resolved (never None): also bounded by the model's length.
        undivided_because: the setting that a resumed chunk would change; None =
            divisible.
        known_lengths: lengths of the members if known beforehand (oracle policies
            only).
        length_prior: the longest response to the prompt in an earlier rollout.
        key: by which a journal knows the group; None without a journal.
        images: of the prompt, in the order of their places in it.
    """

    group_id: GroupId
    num_requests: int
    prompt: bytes
    num_prompt_tokens: int
    max_tokens: int
    min_tokens: int = 0
    seed: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    undivided_because: str | None = None
    known_lengths: Sequence[int] | None = None
    length_prior: int | None = None
    key: GroupKey | None = None
    metadata: Any = None
    images: tuple[PromptImage, ...] = ()

    @property
    def prompt_key(self) -> bytes:
        """Tells prompts apart: their tokens, and their images."""
        return self.prompt + "".join(image.key for image in self.images).encode()
