"""The test of `sampler.py` for the samplers of model runner V2.

They take their settings from the runner's tables, by row. So the test writes into
those, while no request is running; a request that comes later writes its own.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from aseer.dgds.sampler import ROWS_OF_EACH, TESTED, Drawn, Verdict, test_draws

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Kind = tuple[int, int]  # index into TESTED, and tokens drafted

# Rows of a step: their logits are as wide as the model's vocabulary.
_MAX_ROWS = 64
# Tokens of text before the first that is drawn: after any prompt.
_TEXT_TOKENS = 4


def test_sampler_v2(runner: Any) -> Verdict:
    """Test the sampler that the runner verifies drafts with; it must be idle."""
    return test_draws(functools.partial(_draw, runner))


def _draw(
    runner: Any, logits: NDArray[np.float32], drafts: list[int]
) -> Iterator[Drawn]:
    """Draw one batch, in as many steps as it takes; yields the tokens that count."""
    kinds = list(itertools.product(range(len(TESTED)), range(len(logits))))
    kinds *= ROWS_OF_EACH
    most = min(_MAX_ROWS, runner.max_num_reqs)
    for start in range(0, len(kinds), most):
        yield from _draw_step(runner, logits, drafts, kinds[start : start + most])


def _draw_step(
    runner: Any, logits: NDArray[np.float32], drafts: list[int], kinds: Sequence[Kind]
) -> Iterator[Drawn]:
    sampler = runner.sampler
    for slot, (which, _) in enumerate(kinds):
        settings = TESTED[which]
        # A random seed, as without `seed`; the noise depends on it and the place alone.
        sampler.add_request(
            slot,
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k if settings.top_k < logits.shape[1] else 0,
                logprobs=0,
            ),
        )
        runner.req_states.prefill_len.np[slot] = 1
    sampler.apply_staged_writes()
    runner.req_states.prefill_len.copy_to_uva()
    drawn_from = np.concatenate([logits[: length + 1] for _, length in kinds])
    # All other tokens of the model's cannot be drawn.
    shape = (len(drawn_from), sampler.sampling_states.vocab_size)
    rows = torch.full(shape, -torch.inf, device=runner.device)
    rows[:, : logits.shape[1]] = torch.from_numpy(drawn_from).to(runner.device)
    output = runner.rejection_sampler(
        rows,
        _input_batch(drafts, [length for _, length in kinds], runner.device),
        None,
    )
    logprobs = output.logprobs_tensors.logprobs[:, 0].tolist()
    starts = np.cumsum([0] + [length + 1 for _, length in kinds]).tolist()
    for (which, length), tokens, num, start in zip(
        kinds,
        output.sampled_token_ids.tolist(),
        output.num_sampled.tolist(),
        starts,
        strict=False,
    ):
        agreed = 0
        while agreed < length and tokens[agreed] == drafts[agreed]:
            agreed += 1
        if num != 1 + agreed:
            raise ValueError(f"of {tokens}, {num} were kept, with drafts {drafts}")
        for position in range(num):
            yield Drawn(which, position, tokens[position], logprobs[start + position])


def _input_batch(drafts: list[int], lengths: list[int], device: Any) -> Any:
    """A step in which each row verifies so many of the drafts."""
    counts = np.array(lengths) + 1
    ends = np.cumsum(counts)
    num_rows, num_logits = len(counts), int(ends[-1])
    row_of = np.repeat(np.arange(num_rows), counts)
    place = np.arange(num_logits) - np.repeat(ends - counts, counts)
    given = np.array([0, *drafts])[place]

    def on_device(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=dtype, device=device)

    buffers = InputBuffers(num_rows, num_logits, torch.device(device))
    starts = np.concatenate([[0], ends]).astype(np.int32)
    seq_lens = _TEXT_TOKENS + counts
    return replace(
        InputBatch.make_dummy(num_rows, num_logits, buffers),
        expanded_idx_mapping=on_device(row_of, torch.int64),
        expanded_local_pos=on_device(place, torch.int32),
        num_scheduled_tokens=counts.astype(np.int32),
        num_draft_tokens=num_logits - num_rows,
        num_draft_tokens_per_req=(counts - 1).astype(np.int32),
        query_start_loc=on_device(starts, torch.int32),
        query_start_loc_np=starts,
        seq_lens=on_device(seq_lens, torch.int32),
        seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens.astype(np.int32)),
        input_ids=on_device(given, torch.int32),
        positions=on_device(_TEXT_TOKENS + place, torch.int64),
        logits_indices=on_device(np.arange(num_logits), torch.int64),
        cu_num_logits=on_device(starts, torch.int32),
        cu_num_logits_np=starts,
    )
