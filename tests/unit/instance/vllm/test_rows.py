"""Rows of a batch that vLLM mixes up, on a batch that does so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aseer.instance.vllm.rows import (
    expand_batch_to_tokens,
    expands_rightly,
    keep_masks_apart,
)
from tests.lazy import Lazy
from tests.unit.stand_ins import stand_in

torch = Lazy("torch")

MODULE = "vllm.v1.worker.gpu_input_batch"


class Batch:
    """As vLLM's before 0.31: masks move along, and what was there stays behind."""

    def __init__(self, *allowed: int | None) -> None:
        """A request for each, which may have one token alone (None: any)."""
        self.requests: list[int | None] = [*allowed]
        self.batch_update_builder = SimpleNamespace(removed=[])
        self.allowed_token_ids_mask_cpu_tensor: Any = None
        if any(token is not None for token in allowed):
            masks = np.zeros((len(allowed) + 2, 4), bool)
            for row, token in enumerate(allowed):
                if token is not None:
                    masks[row] = np.arange(4) != token
            self.allowed_token_ids_mask_cpu_tensor = masks

    @property
    def num_reqs(self) -> int:
        return len(self.requests) - len(self.batch_update_builder.removed)

    def condense(self) -> None:
        masks = self.allowed_token_ids_mask_cpu_tensor
        for row in sorted(self.batch_update_builder.removed):
            if row < len(self.requests) - 1:
                if masks is not None:
                    masks[row] = masks[len(self.requests) - 1]
                self.requests[row] = self.requests[-1]
            self.requests.pop()
        self.batch_update_builder.removed = []

    def swap_states(self, i1: int, i2: int) -> None:
        masks, requests = self.allowed_token_ids_mask_cpu_tensor, self.requests
        requests[i1], requests[i2] = requests[i2], requests[i1]
        if masks is not None:
            masks[i1] = masks[i2]

    def agrees(self) -> bool:
        """Whether each row's mask is its request's, and free rows have none."""
        masks = self.allowed_token_ids_mask_cpu_tensor
        if masks is None:
            return True
        expected = np.zeros_like(masks)
        for row, token in enumerate(self.requests):
            if token is not None:
                expected[row] = np.arange(4) != token
        return bool((masks == expected).all())


@pytest.fixture
def batch_of(monkeypatch):
    """Batches of an old release, mended or not."""

    def make(version: str) -> type[Batch]:
        kind = type("InputBatch", (Batch,), {})
        named = {"vllm": {"__version__": version}, MODULE: {"InputBatch": kind}}
        stand_in(monkeypatch, named)
        assert keep_masks_apart() == (version != "0.31.0")
        return kind

    return make


@pytest.mark.parametrize("kept", [True, False], ids=["mended", "as it is"])
def test_a_request_that_moves_leaves_no_mask_behind(batch_of, kept):
    batch = (batch_of("0.26.0") if kept else Batch)(0, 1, 2)
    batch.batch_update_builder.removed = [0]
    batch.condense()
    assert batch.requests == [2, 1]
    assert batch.agrees() == kept


@pytest.mark.parametrize("kept", [True, False], ids=["mended", "as it is"])
def test_requests_that_swap_keep_their_masks(batch_of, kept):
    batch = (batch_of("0.30.1") if kept else Batch)(0, None, 2)
    batch.swap_states(0, 2)
    assert batch.requests == [2, None, 0]
    assert batch.agrees() == kept


def test_batches_without_masks_are_moved_all_the_same(batch_of):
    batch = batch_of("0.26.0")(None, None, None)
    batch.batch_update_builder.removed = [1]
    batch.condense()
    batch.swap_states(0, 1)
    assert batch.requests == [None, None]
    assert batch.allowed_token_ids_mask_cpu_tensor is None


def test_a_release_that_keeps_masks_is_left_alone(batch_of):
    kind = batch_of("0.31.0")
    assert (kind.condense, kind.swap_states) == (Batch.condense, Batch.swap_states)


def test_each_requests_value_is_repeated_for_its_tokens():
    values, running = torch.tensor([3.0, 0.0, 5.0]), torch.tensor([2, 2, 5])
    found = expand_batch_to_tokens(values, running, 5, replace_from=3.0, replace_to=1.0)
    assert found.tolist() == [1.0, 1.0, 5.0, 5.0, 5.0]


def test_a_function_that_repeats_wrongly_is_found():
    def off_by_one(x: Any, running: Any, num_tokens: int) -> Any:
        return expand_batch_to_tokens(x.roll(1), running, num_tokens)

    cpu = torch.device("cpu")
    assert expands_rightly(expand_batch_to_tokens, cpu)
    assert not expands_rightly(off_by_one, cpu)
