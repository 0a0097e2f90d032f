"""What a vLLM engine is started with, as vLLM's own code takes it; none is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from aseer.instance.base import InstanceSpec
from aseer.instance.vllm import AsyncLLM, VllmBackend
from aseer.models.tiny import make_tiny

if TYPE_CHECKING:
    from pathlib import Path


class _Enough(Exception):
    """The engine was about to start."""


async def config_of(monkeypatch: pytest.MonkeyPatch, model: Path, **args: Any) -> Any:
    """vLLM's whole configuration of an engine that the backend would start."""
    made: list[Any] = []

    def from_engine_args(engine_args: Any, **kwargs: Any) -> Any:
        context = {k: v for k, v in kwargs.items() if k == "usage_context"}
        made.append(engine_args.create_engine_config(**context))
        raise _Enough

    monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
    spec = InstanceSpec(
        endpoint="",
        identity="",
        instance_id=0,
        backend="vllm",
        report_interval_s=1.0,
        engine_args={"model": str(model), "max_model_len": 256, **args},
    )
    with pytest.raises(_Enough):
        await VllmBackend(spec).start()
    return made[0]


async def test_an_engine_takes_the_limits_of_vllms_own_batch_class(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    tokens, rows = EngineArgs.get_batch_defaults(1)
    model = make_tiny(tmp_path)
    scheduler = (await config_of(monkeypatch, model)).scheduler_config
    assert scheduler.max_num_seqs == rows[UsageContext.LLM_CLASS]
    assert scheduler.max_num_batched_tokens == tokens[UsageContext.LLM_CLASS]
    own = await config_of(monkeypatch, model, max_num_seqs=7)
    assert own.scheduler_config.max_num_seqs == 7
