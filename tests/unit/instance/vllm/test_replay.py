"""Replay in an engine: what it puts in the place of vLLM's sampling, and when.

What it emits is `Recorded`'s; here that only says what it was asked. Stand-ins take the
place of vLLM and of our modules that need it.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.stand_ins import imported

MODULE = "aseer.instance.vllm.replay"


class Verifier:
    """Of drafts by group."""

    def sample_all(self, logits: Any, metadata: Any, sampling: Any) -> Any:
        return ["sampled"], "logprobs"


class RowVerifier:
    """The same on V2."""


class Recorded:
    """Notes what is put in the place of what."""

    def __init__(self, trace: Any, device: Any) -> None:
        self.made_of = (trace, device)

    def instead_of_sampled(self, *asked: Any) -> Any:
        return ("instead of sampled", *asked)

    def instead_of_all(self, *asked: Any) -> Any:
        return ("instead of all", *asked)

    def instead_of_verified(self, *asked: Any) -> Any:
        return ("instead of verified", *asked)

    def by_slots(self, num_slots: int) -> Slots:
        return Slots(num_slots)


class Slots:
    def __init__(self, num: int) -> None:
        self.num, self.begun = num, []

    def begin(self, slot: int, request_id: str) -> None:
        self.begun.append((slot, request_id))

    def instead_of(self, *asked: Any) -> Any:
        return (self.num, tuple(self.begun), *asked)


class Spec(msgspec.Struct):
    engine_args: dict[str, Any]


class Backend:
    """Ours without replay: notes the chunks that it runs."""

    def __init__(self, spec: Spec) -> None:
        self.args = spec.engine_args
        self._engine = "engine"
        self.ran: list[int] = []

    async def start(self) -> str:
        return "info"

    async def run(self, chunk: Any, emit: Any) -> str:
        self.ran.append(chunk.weight_version)
        return "end"


@pytest.fixture
def calls():
    """What workers were told."""
    return []


@pytest.fixture
def module(monkeypatch, calls):
    def verify(drafts: Any, num_drafts: Any, *_: Any, **__: Any) -> str:
        return "verified"

    async def call_workers(engine: str, *call: Any) -> None:
        await asyncio.sleep(0)
        calls.append(call)

    sample = SimpleNamespace(rejection_sample=verify)
    names: dict[str, dict[str, Any]] = {
        "vllm.v1.sample": {"rejection_sampler": sample},
        "aseer.instance.vllm.backend": {"VllmBackend": Backend},
        "aseer.instance.vllm.recorded": {"Recorded": Recorded, "RecordedSlots": Slots},
        "aseer.instance.vllm.weights": {"call_workers": call_workers},
        "aseer.instance.vllm.worker": {"WorkerExtension": type("Extension", (), {})},
        "aseer.dgds.verifier": {"DraftVerifier": Verifier},
        "aseer.dgds.verifier_v2": {"RowVerifier": RowVerifier},
    }
    module = imported(monkeypatch, MODULE, names)
    monkeypatch.setattr(module, "is_v2", lambda runner: runner.is_v2)
    monkeypatch.setattr(
        module, "trace", SimpleNamespace(load=lambda path: f"of {path}")
    )
    return module


def replaying(module: Any, runner: Any) -> Any:
    worker = module.ReplayExtension()
    worker.model_runner, worker.device = runner, "cpu"
    worker.aseer_start_replay("path")
    return runner


def runner_of(*, num_reqs: int = 2, verifier: Any = None, is_v2: bool = False) -> Any:
    """A model runner, whose sampler gives a token for each logit."""

    def sample(logits: Any, *_: Any, **__: Any) -> Any:
        return list(logits), "logprobs"

    return SimpleNamespace(
        is_v2=is_v2,
        max_num_reqs=4,
        sampler=SimpleNamespace(sample=sample),
        input_batch=SimpleNamespace(num_reqs=num_reqs),
        rejection_sampler=verifier,
        req_states=SimpleNamespace(req_id_to_index={"a": 3, "b": 1}),
        add_requests=lambda output: output.added.append("by vLLM"),
    )


def test_what_is_sampled_is_replaced_unless_drafts_are_sampled_too(module):
    runner = replaying(module, runner_of(num_reqs=2))
    found, logprobs = runner.sampler.sample(["x", "y"])
    assert found == ("instead of sampled", ["x", "y"], runner.input_batch, 2)
    assert logprobs == "logprobs"
    # Three tokens for two requests: what verifies them replaces them.
    assert runner.sampler.sample(["x", "y", "z"]) == (["x", "y", "z"], "logprobs")


def test_what_vllm_verifies_and_what_ours_samples_is_replaced(module):
    runner = replaying(module, runner_of(verifier=Verifier()))
    verified = module.rejection_sampler.rejection_sample([7], [1], "more")
    assert verified == ("instead of verified", "verified", [7], [1], runner.input_batch)
    metadata = SimpleNamespace(num_draft_tokens=[1, 0])
    found, logprobs = runner.rejection_sampler.sample_all("logits", metadata, None)
    assert found == ("instead of all", ["sampled"], [1, 0], runner.input_batch)
    assert logprobs == "logprobs"


def test_on_v2_a_request_begins_in_its_slot_and_positions_say_what_is_next(module):
    runner = replaying(module, runner_of(is_v2=True, verifier=RowVerifier()))
    new = [SimpleNamespace(req_id=name) for name in ("a", "b")]
    output = SimpleNamespace(scheduled_new_reqs=new, added=[])
    runner.add_requests(output)
    assert output.added == ["by vLLM"]
    found, processed = runner.sampler.sample(["x"], "slots", "map", "np", "positions")
    assert found == (4, ((3, "a"), (1, "b")), ["x"], "slots", "positions")
    assert processed == "logprobs"


def test_vllms_own_drafts_are_refused_on_v2(module):
    with pytest.raises(RuntimeError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        replaying(module, runner_of(is_v2=True, verifier=object()))
    replaying(module, runner_of(is_v2=True, verifier=None))


def test_a_suffix_drafter_begins_anew_and_no_other_does(module):
    class Drafter:
        def __init__(self, config: str) -> None:
            self.config, self.suffix_cache = config, []

    worker = module.ReplayExtension()
    drafter = Drafter("config")
    worker.model_runner = SimpleNamespace(drafter=drafter, vllm_config="config")
    worker.aseer_forget_texts()
    assert worker.model_runner.drafter is not drafter
    assert worker.model_runner.drafter.config == "config"
    for other in (SimpleNamespace(drafter=(kept := object())), SimpleNamespace()):
        worker.model_runner = other
        worker.aseer_forget_texts()
        assert getattr(other, "drafter", kept) is kept


async def test_an_engine_replays_from_its_start_with_its_users_arguments(module, calls):
    backend = module.ReplayBackend(Spec({"block_size": 32}), "path")
    assert backend.args == {
        "block_size": 32,
        "worker_extension_cls": f"{MODULE}.ReplayExtension",
    }
    assert await backend.start() == "info"
    assert calls == [("aseer_start_replay", "path")]


async def test_at_another_weight_version_texts_are_forgotten_once_before_any_chunk(
    module, calls
):
    backend = module.ReplayBackend(Spec({}), "path")

    async def run(version: int) -> None:
        assert await backend.run(SimpleNamespace(weight_version=version), None) == "end"

    await run(0)
    assert calls == []
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(run(1))
    assert calls == [("aseer_forget_texts",)]
    await run(2)
    assert (len(calls), backend.ran) == (2, [0, 1, 1, 1, 2])
