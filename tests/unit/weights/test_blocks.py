"""What is put into a file is there in the end, by however many threads it goes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from aseer.weights import blocks
from aseer.weights.blocks import BlockWriter
from tests.lazy import Lazy

if TYPE_CHECKING:
    from pathlib import Path

torch = Lazy("torch")


class Device:
    """A GPU as it is to a writer: its copies are done once it is waited for."""

    def __init__(self) -> None:
        self.num_buffers = 0
        self.waiting: list[threading.Event] = []

    def make_buffer(self, num_bytes: int) -> Any:
        self.num_buffers += 1
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def mark(self, device: Any) -> Any:
        self.waiting.append(threading.Event())
        return self

    def synchronize(self) -> None:
        self.waiting[-1].set()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(blocks, "_PIECE_BYTES", 40)


def values(num: int, start: int = 0) -> Any:
    return (torch.arange(num) + start).to(torch.int16)


@pytest.mark.parametrize("num", [0, 1, 50, 51, 1234])
def test_a_tensor_of_any_size_and_layout_is_where_it_was_put(
    tmp_path: Path, num: int
) -> None:
    path = tmp_path / "data"
    wide = values(2 * num).reshape(num, 2)[:, 0]  # every other value
    with path.open("wb", buffering=0) as file:
        writer = BlockWriter(file.fileno())
        assert writer.put(wide, 7, "I16")
        writer.finish()
        writer.close()
    data = path.read_bytes()
    expected = wide.contiguous().numpy().tobytes()
    assert data == (bytes(7) + expected if num else b"")


def test_a_cpus_tensor_may_change_once_it_is_put(tmp_path: Path) -> None:
    path = tmp_path / "data"
    reused = torch.zeros(1000, dtype=torch.uint8)
    with path.open("wb", buffering=0) as file:
        writer = BlockWriter(file.fileno())
        for i in range(5):
            reused.fill_(i)
            writer.put(reused, 1000 * i, "U8")
        writer.finish()
        writer.close()
    assert path.read_bytes() == b"".join(bytes([i]) * 1000 for i in range(5))


def test_a_gpus_tensors_go_through_a_ring_that_is_never_overrun(tmp_path: Path) -> None:
    path, device = tmp_path / "data", Device()
    given = [values(321, start=1000 * i) for i in range(9)]
    with path.open("wb", buffering=0) as file:
        writer = BlockWriter(
            file.fileno(), make_buffer=device.make_buffer, mark=device.mark
        )
        for i, each in enumerate(given):
            writer._stage(each.view(torch.uint8), 642 * i)
        writer.finish()
        writer.close()
    assert path.read_bytes() == b"".join(t.numpy().tobytes() for t in given)
    assert device.num_buffers == writer._num_threads + 1
    assert len(device.waiting) == 9 * 7  # every block was waited for before it went


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [None, "nan", "inf", "-inf"])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(
    tmp_path: Path, name: str, bad: str | None
) -> None:
    dtype = getattr(torch, name)
    spelt = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[name]
    limits = torch.finfo(dtype)
    whole = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, 1.0] * 37).to(
        dtype
    )
    with (tmp_path / "data").open("wb", buffering=0) as file:
        writer = BlockWriter(file.fileno())
        for place in (0, 60, len(whole) - 1):
            given = whole.clone()
            if bad is not None:
                given[place] = float(bad)
            assert writer.put(given, 0, spelt) is (bad is None)
        writer.close()


def test_a_full_disk_is_told_by_the_end_and_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    device = Device()
    with (tmp_path / "data").open("wb", buffering=0) as file:
        writer = BlockWriter(
            file.fileno(), make_buffer=device.make_buffer, mark=device.mark
        )
        with pytest.raises(OSError, match="No space"):
            writer.put(values(1000), 0, "I16")
        with pytest.raises(OSError, match="No space"):
            writer._stage(values(40).view(torch.uint8), 0)
            writer.finish()
        writer.close()
    assert not [t for t in threading.enumerate() if "aseer-weights" in t.name]
