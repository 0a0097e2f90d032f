"""A sampler for drafts is judged by what it draws, however slow the machine is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm")

from aseer.dgds import sampler
from aseer.dgds.sampler import TESTED, Drawn

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray


def test_a_sampler_is_not_trusted_for_its_first_token_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler, "_MAX_TEST_S", 0.0)  # a machine that is far too slow
    num = 0

    def draw(logits: NDArray[np.float32], drafts: list[int]) -> Iterator[Drawn]:
        nonlocal num
        greedy = len(TESTED) - 1
        token = int(logits[0].argmax())
        for _ in range(59):
            num += 1
            yield Drawn(greedy, 0, token, 0.0)
        raise ValueError("1 was kept, with no drafts")

    verdict = sampler.test_draws(draw)
    assert not verdict.is_right
    assert "1 was kept" in verdict.fault
    assert num == 59
