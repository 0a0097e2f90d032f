"""The sampler that verifies drafts on model runner V2; see `verifier.py`.

V2 draws every token with noise that depends on the request's seed and the token's place
in the text alone. So here a draft changes not even which token is drawn: with the same
logits a seeded request samples what it samples without drafts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected


class RowVerifier:
    """Takes the place of V2's RejectionSampler, for drafts without distributions."""

    def __init__(self, sampler: Any, max_draft_tokens: int) -> None:
        self.sampler = sampler
        self._num_columns = max_draft_tokens + 1

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        draft_logits: None = None,
        invalid_drafts: None = None,
    ) -> Any:
        """Sample every row's next tokens; see V2's RejectionSampler.

        Args:
            logits: [num_drafted + num_rows, vocab_size], one row's after the other's.
            input_batch: vLLM's InputBatch.
            invalid_drafts: drafts that a grammar refuses. Rows with a grammar have no
                drafts of ours.

        Returns:
            vLLM's SamplerOutput: `sampled_token_ids` [num_rows, longest draft + 1], of
            which `num_sampled` count; logprobs of all `logits`, in their order.
        """
        output = self.sampler(logits, input_batch)
        sampled = output.sampled_token_ids.view(-1)
        starts = input_batch.cu_num_logits[:-1].long()
        counts = torch.diff(input_batch.cu_num_logits).long()
        column = torch.arange(self._num_columns, device=logits.device)
        place = (starts[:, None] + column).clamp(max=len(sampled) - 1)
        tokens = sampled[place]
        # What the model was given: a row's last token, then its drafts.
        given = input_batch.input_ids[input_batch.logits_indices]
        drafts = given[place[:, 1:]]
        guessed = (tokens[:, :-1] == drafts) & (column[1:] < counts[:, None])
        num_sampled = 1 + guessed.long().cumprod(1).sum(1)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_sampled.to(torch.int32),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return replace(
            output,
            sampled_token_ids=tokens,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
