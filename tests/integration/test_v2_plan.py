"""On which of vLLM's model runners drafts by group are, and with which settings."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from aseer.dgds.messages import ADDITIONAL_CONFIG_KEY
from aseer.dgds.stepclock import StepClock
from aseer.instance.vllm import v2
from aseer.instance.vllm.limits import kv_world_size, num_lookahead_tokens
from aseer.instance.vllm.speculation import Speculation
from aseer.instance.vllm.v2 import PRICE_OF_V1, engine_args_for_v2, why_not_v2

SCHEDULE = "num_speculative_tokens_per_batch_size"


def schedule(**args: Any) -> list[tuple[int, int, int]]:
    planned = engine_args_for_v2(args, max_draft_tokens=8, tail_draft_tokens=16)
    json.dumps(planned["additional_config"])  # vLLM makes a key of it
    return planned["speculative_config"][SCHEDULE]


@pytest.mark.parametrize(
    ("args", "variable", "device", "reason"),
    [
        ({}, None, "cuda", ""),
        ({}, "1", "cuda", ""),
        ({}, "1", "cpu", ""),
        ({}, None, "cpu", "CPUs run V1"),
        ({}, "0", "cuda", "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"tensor_parallel_size": 1}, None, "cuda", ""),
        ({"tensor_parallel_size": 2}, None, "cuda", "tensor_parallel_size=2"),
        ({"pipeline_parallel_size": 2}, None, "cuda", "pipeline_parallel_size=2"),
    ],
)
def test_drafts_are_on_v2_where_that_can_be(
    monkeypatch, args, variable, device, reason
):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", variable)
    said = why_not_v2(args, device=device)
    assert said.startswith(reason)
    assert bool(said) == bool(reason)


def test_an_older_vllm_drafts_on_v1(monkeypatch):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(v2.importlib.util, "find_spec", lambda name: None)
    assert "no drafter" in why_not_v2({}, device="cuda")


def test_the_price_of_v1_is_told():
    text = PRICE_OF_V1.format(reason="VLLM_USE_V2_MODEL_RUNNER=0")
    assert "deprecated" in text
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in text


def test_steps_of_many_rows_have_no_placeholders():
    """So that vLLM captures whole graphs for steps without drafts."""
    assert schedule() == [(1, 4, 16), (5, 255, 8), (256, 256, 0)]
    assert schedule(max_num_seqs=1024) == [(1, 4, 16), (5, 255, 8), (256, 1024, 0)]
    assert schedule(max_num_seqs=64) == [(1, 4, 16), (5, 63, 8), (64, 64, 0)]
    few = schedule(max_num_seqs=1024, max_num_batched_tokens=2048)
    assert few == [(1, 4, 16), (5, 113, 8), (114, 1024, 0)]
    assert schedule(max_num_seqs=3) == [(1, 2, 16), (3, 3, 0)]
    assert schedule(max_num_seqs=1) == [(1, 1, 16)]


def test_vllm_takes_the_schedule():
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    for most in (1, 3, 64, 1024):
        lookup = build_dynamic_sd_schedule_lookup(schedule(max_num_seqs=most), most, 16)
        assert lookup[1] == 16
        assert most == 1 or lookup[most] == 0


def test_users_additional_config_stays():
    planned = engine_args_for_v2(
        {"additional_config": {"theirs": 7}}, max_draft_tokens=2, tail_draft_tokens=3
    )
    assert planned["additional_config"] == {"theirs": 7, ADDITIONAL_CONFIG_KEY: 1}
    assert planned["speculative_config"]["num_speculative_tokens"] == 3


@pytest.mark.parametrize(
    ("method", "is_async", "expected"),
    [
        (None, False, 0),
        (None, True, 1),
        ("custom_class", False, 0),
        ("ngram", False, 8),
        # A step plans behind 8 drafts that are not yet verified, and 8 more.
        ("ngram_gpu", True, 17),
    ],
)
def test_kv_is_reserved_for_all_that_is_in_flight(method, is_async, expected):
    speculative = None
    if method is not None:
        speculative = SimpleNamespace(
            method=method,
            num_speculative_tokens=8,
            **{SCHEDULE: [(1, 1, 8)] if method == "custom_class" else None},
        )
    config = SimpleNamespace(
        speculative_config=speculative,
        scheduler_config=SimpleNamespace(async_scheduling=is_async),
    )
    assert num_lookahead_tokens(config) == expected


class Engine:
    """Answers as an engine with one worker does."""

    def __init__(self, runner: Any) -> None:
        from aseer.instance.vllm.worker import WorkerExtension

        self.worker = WorkerExtension()
        self.worker.model_runner = runner

    async def collective_rpc(self, method: str, args: Any = ()) -> list[Any]:
        answer = getattr(self.worker, method)(*args)
        return [json.loads(json.dumps(answer))]


async def test_a_worker_on_v1_tells_its_times():
    runner = SimpleNamespace(execute_model=lambda output: None)
    clock = runner.aseer_clock = StepClock()
    runner.execute_model = clock.timed(runner.execute_model)
    step = SimpleNamespace(
        total_num_scheduled_tokens=1, scheduled_spec_decode_tokens={}
    )
    runner.execute_model(step)
    clock.end_step(0.0)
    counts = await Speculation(Engine(runner), None)._times()
    assert counts.step_s == clock.step_s > 0
    assert sum(counts.share_buckets) == 1
    assert counts.num_drafts == 0
    idle = await Speculation(Engine(SimpleNamespace()), None)._times()
    assert idle.step_s == 0


async def test_a_worker_on_v2_counts_drafts_itself():
    clock = SimpleNamespace(
        step_s=2.0,
        draft_s=0.5,
        share_buckets=[1],
        num_drafts=3,
        drafted=[3, 2],
        accepted=[2, 0],
    )
    runner = SimpleNamespace(req_states=None, aseer_clock=clock)
    speculation = Speculation(Engine(runner), None, on_v2=True)
    counts = await speculation._times()
    assert (counts.num_drafts, counts.drafted, counts.accepted) == (3, (3, 2), (2, 0))
    placeholders = SimpleNamespace(
        num_drafts=9, num_draft_tokens_per_pos=[9], num_accepted_tokens_per_pos=[2]
    )
    speculation.record(placeholders)
    assert speculation.counts.num_drafts == 0, "vLLM's own count is of placeholders"


@pytest.mark.parametrize(
    ("is_latent", "tensor_parallel", "decode_parallel", "pieces"),
    [(False, 4, 1, 4), (True, 4, 1, 1), (True, 4, 2, 2), (False, 1, 1, 1)],
)
def test_a_latent_is_stored_once_on_however_many_gpus_it_is(
    is_latent: bool, tensor_parallel: int, decode_parallel: int, pieces: int
) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(use_mla=is_latent),
        parallel_config=SimpleNamespace(
            world_size=tensor_parallel,
            tensor_parallel_size=tensor_parallel,
            decode_context_parallel_size=decode_parallel,
        ),
    )
    assert kv_world_size(config) == pieces
