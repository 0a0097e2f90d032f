"""Weights straight to a real engine, by a transfer engine that anybody could register.

What carries the bytes is a stand-in for a GPU's memory; the calls are vLLM's public
ones, and so are what they do to a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.weights import direct
from aseer.weights.carriers import fill, told_of
from tests.e2e.tiny import tiny_config, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from aseer.weights.carriers import Engines
    from aseer.weights.held import HeldTensors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow
BUFFER_BYTES = 1 << 20  # so that the tiny model takes many
GREEDY = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
GROUPS = [aseer.Group([5 + i, 6, 7], n=2, sampling=GREEDY) for i in range(3)]


class FileCarrier:
    """Has engines read one file again and again, as `IpcCarrier` one buffer."""

    path: Path

    def __init__(self, tensors: HeldTensors) -> None:
        size = max(BUFFER_BYTES, tensors.largest_bytes)
        self._buffer = torch.zeros(size, dtype=torch.uint8)

    def get_ready(self, engines: Engines | None) -> None:
        assert engines is not None
        assert [peer.num_workers for peer in engines.look()] == [1]
        engines.init({"path": str(self.path)}).result()

    def send(self, engines: Engines | None, tensors: HeldTensors) -> None:
        assert engines is not None
        for filled in fill(self._buffer, tensors.pairs()):
            self.path.write_bytes(self._buffer.numpy().tobytes())
            engines.update(told_of(filled)).result()

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


def roll(engine: aseer.Engine) -> dict[str, Any]:
    done = list(engine.rollout_sync(GROUPS))
    assert {r.weight_version for r in done} == {engine.weight_version}
    return {r.request_id: (r.token_ids, r.logprobs) for r in done}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for request_id, (tokens, logprobs) in expected.items():
        assert found[request_id][0] == tokens
        assert found[request_id][1] == pytest.approx(logprobs, abs=1e-4)


def test_a_real_engine_computes_with_what_was_sent_straight_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    calls = tmp_path / "calls"
    FileCarrier.path = tmp_path / "buffer"
    way = direct.Way(FileCarrier, "aseer-test", "cpu")
    monkeypatch.setitem(direct.WAYS, "ipc", way)
    old = load_file(tiny_model() / "model.safetensors")
    new = {name: tensor * 1.25 for name, tensor in old.items()}
    config = tiny_config(
        num_instances=1,
        engine_args={
            "weight_transfer_config": {"backend": "aseer-test"},
            "worker_extension_cls": "tests.e2e.fake_transfer.Extension",
        },
        env={"FAKE_TRANSFER_CALLS": str(calls)},
    )
    with aseer.Engine(config) as engine:
        first = roll(engine)
        report = engine.update_weights_sync(new, transfer="ipc", verify=True)
        assert report.num_tensors == len(new)
        straight = roll(engine)
        engine.update_weights_sync(old, transfer="host")
        assert_same(roll(engine), first)
        engine.update_weights_sync(new, transfer="host")
        assert_same(roll(engine), straight)
        assert straight != first
        made = [line.split()[1] for line in calls.read_text().splitlines()]
        assert made[:2] == ["init", "start"]
        assert made[-2:] == ["finish", "shutdown"]
        assert set(made[2:-2]) == {"update"}
        assert len(made) > 6, "the model is larger than one buffer"

        bad = new | {"model.norm.weight": new["model.norm.weight"] * float("nan")}
        with pytest.raises(aseer.WeightUpdateError, match="NaN or infinite"):
            engine.update_weights_sync(bad, transfer="ipc")
        assert len(calls.read_text().splitlines()) == len(made), "nothing was called"
