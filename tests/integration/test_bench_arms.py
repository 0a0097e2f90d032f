"""What engines each arm of `bench_speculation.py` has, as vLLM's own code takes it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from aseer.data.trace import Trace, TraceGroup
from aseer.dgds.messages import ADDITIONAL_CONFIG_KEY, DraftingSpec
from aseer.instance.base import InstanceSpec
from aseer.instance.vllm import backend as backends
from aseer.instance.vllm.backend import AsyncLLM, VllmBackend
from aseer.models.tiny import make_tiny
from aseer.node.machine import Machine
from aseer.runtime.launch import plan_instances

if TYPE_CHECKING:
    from collections.abc import Callable

BENCH = Path(__file__).parents[2] / "bench"
ARMS = ("v2-off", "v1-off", "v1-dgds", "v2-dgds")
GPU = Machine(
    gpus=("0",),
    cores=(0, 1),
    free_memory_bytes=8 << 30,
    free_shm_bytes=4 << 30,
    cpu_only=False,
    cpu_dtype="bfloat16",
)
RECORDED = Trace(
    groups=[TraceGroup(np.array([5, 6], np.int32), [np.array([7, 1], np.int32)])],
    settings={"max_tokens": 64},
)


class _Enough(Exception):
    """The engine was about to start."""


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """vLLM's configuration of an arm's engine; it would be on a GPU."""
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("bench_speculation")
    for name in ("bench_speculation", "common", "replaying", "drafting"):
        monkeypatch.delitem(sys.modules, name)  # are the benchmarks' own
    model = make_tiny(tmp_path)
    options = {"device": "cuda", "engines": 1, "dtype": "float32"}
    args = SimpleNamespace(**options, kv_cache_bytes=1 << 28, chunk_size=128)
    monkeypatch.setattr(backends.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(backends, "why_not_v2", as_on_a_gpu(backends.why_not_v2))
    made: list[Any] = []

    def from_engine_args(engine_args: Any, **_: Any) -> Any:
        made.append(engine_args)
        raise _Enough

    monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)

    async def engine(arm: str) -> Any:
        config = bench.config_of(model, arm, 64, RECORDED, args)
        (launch,) = plan_instances(config, GPU)
        assert launch.share == "GPU 0"
        for name, value in launch.env.items():
            monkeypatch.setenv(name, value)
        drafting = None
        if config.speculation.method == "dgds":
            drafting = DraftingSpec(
                settings=config.speculation, endpoint="ipc://x", fetch_interval_s=1.0
            )
        spec = InstanceSpec(
            endpoint="",
            identity="",
            instance_id=0,
            backend="vllm",
            report_interval_s=1.0,
            engine_args=dict(launch.engine_args),
            drafting=drafting,
        )
        with pytest.raises(_Enough):
            await VllmBackend(spec).start()
        return made.pop(), launch.env

    return engine


def as_on_a_gpu(why_not_v2: Callable[..., str]) -> Callable[..., str]:
    return lambda args, device: why_not_v2(args, device="cuda")


@pytest.mark.parametrize("arm", ARMS)
async def test_an_arm_has_the_runner_and_the_drafts_of_its_name(engine_of, arm):
    args, env = await engine_of(arm)
    runner, method = arm.split("-")
    assert env["VLLM_USE_V2_MODEL_RUNNER"] == {"v1": "0", "v2": "1"}[runner]
    speculative = args.speculative_config
    is_ours = ADDITIONAL_CONFIG_KEY in (args.additional_config or {})
    if method == "off":
        assert speculative is None
        assert not is_ours
    elif runner == "v1":
        assert speculative["method"] == "custom_class"
        assert not is_ours
    else:
        assert speculative["method"] == "ngram_gpu"
        assert is_ours


async def test_arms_differ_in_nothing_else(engine_of):
    """But for what says how they draft, and each engine's own seed."""
    made = [(await engine_of(arm))[0] for arm in ARMS]
    theirs = ("speculative_config", "additional_config", "compilation_config")
    first, *others = (
        {name: value for name, value in vars(args).items() if name not in theirs}
        for args in made
    )
    assert first["max_num_seqs"] == 64
    for other in others:
        assert other == first
