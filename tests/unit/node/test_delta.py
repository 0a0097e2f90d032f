"""What is told of a changed block gives that block exactly, and nonsense is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest

from aseer.node import delta


def changed(data: bytes, share: float, seed: int) -> bytes:
    """Some of its numbers are others."""
    rng = np.random.default_rng(seed)
    numbers = np.frombuffer(data, np.uint16).copy()
    places = rng.random(len(numbers)) < share
    numbers[places] ^= rng.integers(1, 1 << 16, places.sum(), dtype=np.uint16)
    return numbers.tobytes()


@pytest.mark.parametrize("size", [0, 2, 10, 1000, 1 << 20])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.2])
def test_a_block_and_what_changed_give_the_next_one(size: int, share: float) -> None:
    base = random.Random(1).randbytes(size)
    data = changed(base, share, 2)
    told = delta.encode(base, data)
    assert told is not None or size == 2
    if told is not None:
        assert delta.apply(base, told) == data


def test_what_a_step_of_training_changes_is_told_in_few_bytes() -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal(1 << 19, np.float32) * 0.02
    base = (weights.view(np.uint32) >> 16).astype(np.uint16)
    data = base.copy()
    data[rng.random(len(base)) < 0.03] ^= 1
    told = delta.encode(base.tobytes(), data.tobytes())
    assert told is not None
    assert len(told) < 0.03 * len(base.tobytes())


def test_a_block_that_changed_much_is_told_as_a_whole() -> None:
    base = random.Random(1).randbytes(1000)
    assert delta.encode(base, changed(base, 0.5, 2)) is None
    assert delta.encode(base, base[:-2]) is None
    assert delta.encode(base[:-1], base[:-1]) is None, "no numbers of 16 bits"


def test_nonsense_is_refused_or_gives_a_block_of_the_same_size() -> None:
    rng = random.Random(5)
    base = rng.randbytes(1000)
    told = delta.encode(base, changed(base, 0.1, 2))
    assert told is not None
    refused = 0
    for _ in range(2000):
        bad = bytearray(told if rng.random() < 0.8 else rng.randbytes(60))
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        if rng.random() < 0.3:
            del bad[rng.randrange(len(bad)) :]
        try:
            assert len(delta.apply(base, bytes(bad))) == len(base)
        except ValueError:
            refused += 1
    assert refused > 500
    other = delta.encode(bytes(2000), changed(bytes(2000), 0.1, 3))
    assert other is not None
    with pytest.raises(ValueError, match=r"larger block|as long as"):
        delta.apply(base, other)
    with pytest.raises(ValueError, match="as long as"):
        delta.apply(base[:-1], told)
