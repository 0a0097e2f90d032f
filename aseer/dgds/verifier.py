"""The sampler that verifies drafts: every position is sampled as if there were none.

    drafted            d1   d2   d3
    logits after       the text; the text, d1; the text, d1, d2; the text, d1, d2, d3
    sampled from them  x0   x1   x2   x3
    kept               x0,  x1 if x0 = d1,  x2 if x1 = d2 too, ...

x1 was sampled as if d1 came before it, so x1 counts if x0 = d1. The tokens that are
kept are those that the model would have sampled one by one, whatever was drafted. That
is speculative sampling (Leviathan et al. 2023, Chen et al. 2023) for drafts that are
texts and not distributions: to accept d1 with the model's probability, and otherwise to
draw from what remains, is the same as to draw once. vLLM's own sampler takes several
passes over the vocabulary for each position, and one more for each place that no draft
fills; this sampler takes the time that the same number of tokens takes without drafts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.rejection_sampler import RejectionSampler

_NOT_KEPT = -1  # vLLM's mark for what follows the last token of a row


class DraftVerifier(RejectionSampler):  # type: ignore[misc]
    """Takes the place of vLLM's RejectionSampler, for drafts without distributions."""

    def forward(
        self, metadata: Any, draft_probs: None, logits: torch.Tensor, sampling: Any
    ) -> SamplerOutput:
        """Sample every row's next tokens.

        Args:
            metadata: vLLM's SpecDecodeMetadata.
            logits: [num_drafted + num_rows, vocab_size], one row's after the other's.
            sampling: vLLM's SamplingMetadata, by rows.

        Returns:
            `sampled_token_ids` [num_rows, longest draft + 1] int32, with -1 behind the
            last kept token; and logprobs, if asked for, of all these places, one row
            after the other.
        """
        if not metadata.max_spec_len:
            output: SamplerOutput = self.sampler(logits, sampling)
            return output
        logits = logits.to(torch.float32)
        if _has_constraints(sampling):
            self._constrain(logits, metadata, sampling)
        sampled, logprobs = self.sample_all(logits, metadata, sampling)
        ends = metadata.cu_num_sampled_tokens
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        column = torch.arange(metadata.max_spec_len + 1, device=logits.device)
        place = ((ends - counts)[:, None] + column).clamp(max=len(sampled) - 1)
        tokens = sampled[place]
        # A row has one draft less than logits.
        first_draft = metadata.cu_num_draft_tokens - counts + 1
        drafts = metadata.draft_token_ids[
            (first_draft[:, None] + column[:-1]).clamp(max=len(sampled) - len(ends) - 1)
        ]
        guessed = (tokens[:, :-1] == drafts) & (column[1:] < counts[:, None])
        kept = torch.ones_like(tokens, dtype=torch.bool)
        kept[:, 1:] = guessed.cumprod(1)
        scored = None
        if sampling.max_num_logprobs is not None:
            own = self.sampler.gather_logprobs(
                logprobs, sampling.max_num_logprobs, sampled
            )
            scored = LogprobsTensors(*(values[place.flatten()] for values in own[:3]))
        return SamplerOutput(
            sampled_token_ids=tokens.masked_fill(~kept, _NOT_KEPT).to(torch.int32),
            logprobs_tensors=scored,
        )

    def sample_all(
        self, logits: torch.Tensor, metadata: Any, sampling: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One token from each of the logits, [len(logits)] int64, and all logprobs."""
        num_tokens = [n + 1 for n in metadata.num_draft_tokens]
        ends = metadata.cu_num_sampled_tokens
        row_of = torch.arange(len(ends), device=ends.device).repeat_interleave(
            torch.diff(ends, prepend=ends.new_zeros(1)), output_size=len(logits)
        )
        generators = {}
        if sampling.generators:
            rows = [row for row, n in enumerate(num_tokens) for _ in range(n)]
            own = sampling.generators
            generators = {i: own[row] for i, row in enumerate(rows) if row in own}

        def of_row(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[row_of]

        by_token = replace(
            sampling,
            temperature=of_row(sampling.temperature),
            top_p=of_row(sampling.top_p),
            top_k=of_row(sampling.top_k),
            generators=generators,
        )
        sampled, logprobs = self.sampler.sample(logits, by_token)
        return sampled.long(), logprobs

    def _constrain(self, logits: torch.Tensor, metadata: Any, sampling: Any) -> None:
        """Apply penalties, and what forbids tokens, by vLLM's code, in place."""
        last, others = metadata.bonus_logits_indices, metadata.target_logits_indices
        logits[last] = self.sampler.apply_logits_processors(
            logits[last], sampling, predict_bonus_token=True
        )
        logits[others] = self.apply_logits_processors(
            logits[others], sampling, metadata
        )


def _has_constraints(sampling: Any) -> bool:
    thinking = getattr(sampling, "thinking_budget_state_holder", None)
    return (
        not sampling.no_penalties
        or bool(sampling.bad_words_token_ids)
        or sampling.allowed_token_ids_mask is not None
        # vLLM has one for `min_tokens` always, mostly with nothing to do.
        or any(
            getattr(processor, "min_toks", True)
            for processor in sampling.logitsprocs.non_argmax_invariant
        )
        or (thinking is not None and thinking.has_tracked_requests())
    )
