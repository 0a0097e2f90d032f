"""Tests of the samplers that verify drafts.

A sampler is tested by drawing from it, on the engine's own kernels and device. For
known logits, the tokens that are drawn must follow their distribution, whatever was
drafted, and come with their logprobs. aseer's drafts are verified by `DraftVerifier`,
the drafts of vLLM's own drafters by its RejectionSampler.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

_VOCAB_SIZE = 24
_MAX_DRAFT_TOKENS = 3
ROWS_OF_EACH = 64  # rows of a batch with the same settings and draft length
_NUM_BATCHES = 16
# Where each draw takes long, fewer must do: a wrong sampler is mostly wrong by much.
_MAX_TEST_S = 20.0
# So many are drawn however long that takes: two of each kind, or a slow machine would
# trust a sampler that it has hardly seen.
_MIN_DRAWS = 60
_MIN_EXPECTED = 5.0
# About one right sampler in ten thousand fails.
_MIN_P_VALUE = 1e-6
_MAX_LOGPROB_ERROR = 1e-4


class Settings(NamedTuple):
    """A row's sampling settings; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int


TESTED = (
    Settings(1.0, 1.0, _VOCAB_SIZE),
    Settings(0.7, 1.0, _VOCAB_SIZE),
    Settings(1.3, 1.0, 5),
    Settings(1.0, 0.9, _VOCAB_SIZE),
    Settings(0.6, 0.8, 10),
    Settings(0.0, 1.0, _VOCAB_SIZE),
)


class Verdict(NamedTuple):
    """Whether the sampler may be trusted, and why not."""

    is_right: bool
    min_p_value: float
    num_draws: int
    fault: str


class Drawn(NamedTuple):
    """A token of `TESTED[which]`, after `position` accepted drafts."""

    which: int
    position: int
    token: int
    logprob: float


# From [num_logits, vocab_size] logits, and drafts for all but the last of them.
Draw: TypeAlias = "Callable[[NDArray[np.float32], list[int]], Iterator[Drawn]]"


def test_sampler(sampler: Any, device: torch.device) -> Verdict:
    """Test model runner V1's `RejectionSampler`, or one that is called like it."""
    return test_draws(functools.partial(_draw, sampler, device))


def test_draws(draw: Draw) -> Verdict:
    """Draw thousands of tokens and compare, or as many as time allows.

    Rows of all settings and draft lengths share a batch. Given that all drafts before
    it were accepted, the token at position j is a sample of the j-th distribution: a
    G-test for each setting and position. Its logprob is that distribution's.
    """
    since = time.monotonic()
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (_MAX_DRAFT_TOKENS + 1, _VOCAB_SIZE)).astype(np.float32)
    # Drafts that are likely to be accepted, and a last one that is not.
    drafts = logits[:-1].argsort(axis=1)[:, -2].tolist()
    drafts[-1] = int(logits[-2].argsort()[-6])
    shape = (len(TESTED), _MAX_DRAFT_TOKENS + 1, _VOCAB_SIZE)
    counts, said = np.zeros(shape, np.int64), np.zeros(shape)
    try:
        batches = (draw(logits, drafts) for _ in range(_NUM_BATCHES))
        for num, drawn in enumerate(itertools.chain.from_iterable(batches), 1):
            counts[drawn.which, drawn.position, drawn.token] += 1
            said[drawn.which, drawn.position, drawn.token] = drawn.logprob
            if num >= _MIN_DRAWS and time.monotonic() - since > _MAX_TEST_S:
                break
    except Exception as error:  # a sampler that is broken, or called differently
        return Verdict(False, 0.0, int(counts.sum()), f"it fails: {error!r}")
    num_draws = int(counts.sum())
    worst, fault = 1.0, ""
    for which, settings in enumerate(TESTED):
        for position, row in enumerate(logits):
            seen = counts[which, position]
            expected = distribution(row, settings)
            p_value = g_test(seen, expected)
            if p_value < worst:
                worst = p_value
                fault = f"{settings} at position {position}: p-value {p_value:.1e}"
            off = np.abs(said[which, position] - _logprobs(row, settings))[seen > 0]
            if not (off <= _MAX_LOGPROB_ERROR).all():
                fault = (
                    f"{settings} at position {position}: logprobs off by {off.max()}"
                )
                return Verdict(False, worst, num_draws, fault)
    is_right = worst >= _MIN_P_VALUE
    return Verdict(is_right, worst, num_draws, "" if is_right else fault)


def _draw(
    sampler: Any, device: Any, logits: NDArray[np.float32], drafts: list[int]
) -> Iterator[Drawn]:
    """Draw one batch; yields the tokens that count."""
    lengths = range(_MAX_DRAFT_TOKENS + 1)
    kinds = list(itertools.product(range(len(TESTED)), lengths)) * ROWS_OF_EACH
    metadata = _draft_metadata([drafts[:length] for _, length in kinds], device)
    rows = np.concatenate([logits[: length + 1] for _, length in kinds])
    output = sampler(
        metadata,
        None,
        torch.from_numpy(rows).to(device),
        _sampling_metadata([TESTED[which] for which, _ in kinds], device),
    )
    shape = output.sampled_token_ids.shape
    logprobs = output.logprobs_tensors.logprobs[:, 0].reshape(shape).tolist()
    for (which, length), tokens, scores in zip(
        kinds, output.sampled_token_ids.tolist(), logprobs, strict=True
    ):
        for position in range(length + 1):
            yield Drawn(which, position, tokens[position], scores[position])
            if position < length and tokens[position] != drafts[position]:
                break


def _draft_metadata(drafts: list[list[int]], device: Any) -> Any:
    metadata = SpecDecodeMetadata.make_dummy(drafts, device=device)
    ends = np.cumsum([len(d) + 1 for d in drafts])
    all_rows = np.arange(ends[-1])
    is_bonus = np.isin(all_rows, ends - 1)

    def on_device(values: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(device)

    metadata.logits_indices = on_device(all_rows)
    metadata.bonus_logits_indices = on_device(ends - 1)
    metadata.target_logits_indices = on_device(all_rows[~is_bonus])
    return metadata


def _sampling_metadata(rows: list[Settings], device: Any) -> Any:
    zeros = torch.zeros(len(rows), device=device)
    return SamplingMetadata(
        temperature=torch.tensor([r.temperature for r in rows], device=device),
        all_greedy=False,
        all_random=False,
        top_p=torch.tensor([r.top_p for r in rows], device=device),
        top_k=torch.tensor([r.top_k for r in rows], dtype=torch.int32, device=device),
        generators={},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=zeros,
        presence_penalties=zeros,
        repetition_penalties=zeros + 1,
        output_token_ids=[[] for _ in rows],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def distribution(
    logits: NDArray[np.float32], settings: Settings
) -> NDArray[np.float64]:
    """The distribution to be sampled from: temperature, then top-k, then top-p."""
    probs: NDArray[np.float64] = np.zeros(len(logits))
    if not settings.temperature:
        probs[logits.argmax()] = 1
        return probs
    scaled = logits.astype(np.float64) / settings.temperature
    order = np.argsort(-scaled)
    np.exp(scaled - scaled.max(), out=probs)
    probs[order[settings.top_k :]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= settings.top_p]] = 0
    probs /= probs.sum()
    return probs


def _logprobs(logits: NDArray[np.float32], settings: Settings) -> NDArray[np.float64]:
    """What the sampled tokens' logprobs are to be; greedy tokens have the model's."""
    if not settings.temperature:
        settings = settings._replace(temperature=1.0)
    with np.errstate(divide="ignore"):
        return np.log(distribution(logits, settings))


def g_test(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """The p-value of counts under a distribution; 0 if one counts that cannot be."""
    if counts[expected == 0].any():
        return 0.0
    means = expected * counts.sum()
    is_rare = means < _MIN_EXPECTED
    cells = [*zip(counts[~is_rare], means[~is_rare], strict=True)]
    if means[is_rare].sum() > 0:
        cells.append((counts[is_rare].sum(), means[is_rare].sum()))
    if len(cells) < 2:
        return 1.0
    observed, mean = np.array(cells, np.float64).T
    terms = observed * np.log(np.where(observed > 0, observed, 1.0) / mean)
    g = 2 * float(terms[observed > 0].sum())
    half_df = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(
        torch.special.gammaincc(half_df, torch.tensor(max(g, 0.0) / 2).double())
    )
