"""What a vLLM engine is started with, as vLLM's own code takes it; none is started."""

from __future__ import annotations

from array import array
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

import aseer
from aseer.instance.base import InstanceSpec
from aseer.instance.vllm.backend import AsyncLLM, VllmBackend
from aseer.instance.vllm.patches import _keep_schedule
from aseer.instance.vllm.speculation import Speculation
from aseer.instance.vllm.worker import WorkerExtension
from aseer.models.tiny import make_tiny
from aseer.types import Chunk, ChunkId, GroupId, InstanceId, RequestId
from tests.unit.builders import info_of

if TYPE_CHECKING:
    from pathlib import Path


class _Enough(Exception):
    """The engine was about to start."""


def spec_of(model: Path, **args: Any) -> InstanceSpec:
    return InstanceSpec(
        endpoint="",
        identity="",
        instance_id=0,
        backend="vllm",
        report_interval_s=1.0,
        engine_args={"model": str(model), "max_model_len": 256, **args},
    )


async def config_of(monkeypatch: pytest.MonkeyPatch, model: Path, **args: Any) -> Any:
    """vLLM's whole configuration of an engine that the backend would start."""
    made: list[Any] = []

    def from_engine_args(engine_args: Any, **kwargs: Any) -> Any:
        context = {k: v for k, v in kwargs.items() if k == "usage_context"}
        made.append(engine_args.create_engine_config(**context))
        raise _Enough

    monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
    with pytest.raises(_Enough):
        await VllmBackend(spec_of(model, **args)).start()
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


class _Engine:
    """An engine whose sampler for drafts is wrong, on either of vLLM's runners."""

    def __init__(self, runner: Any, args: Any) -> None:
        self.vllm_config = SimpleNamespace(
            speculative_config=args.speculative_config, model_config=None
        )
        self.is_down = False
        self._worker = WorkerExtension()
        self._worker.model_runner = runner

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        if method == "aseer_check_sampler":
            return [{"is_right": False, "fault": "it fails"}]
        return [getattr(self._worker, method)(*args)]

    def get_tokenizer(self) -> Any:
        raise _Enough

    def shutdown(self) -> None:
        self.is_down = True


V1 = SimpleNamespace(
    drafter=SimpleNamespace(propose=None), input_batch=SimpleNamespace(req_ids=["a"])
)
V2 = SimpleNamespace(speculator=object(), req_states=None)


@pytest.mark.parametrize(("runner", "num_starts"), [(V1, 1), (V2, 2)], ids=["V1", "V2"])
async def test_drafts_that_are_refused_are_not_drafted_on_either_runner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runner: Any, num_starts: int
) -> None:
    made: list[_Engine] = []

    def from_engine_args(engine_args: Any, **_: Any) -> Any:
        made.append(_Engine(runner, engine_args))
        return made[-1]

    monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
    drafts = {"method": "ngram", "num_speculative_tokens": 4}
    backend = VllmBackend(spec_of(tmp_path, speculative_config=drafts))
    with pytest.raises(_Enough):
        await backend.start()
    assert len(made) == num_starts
    assert [engine.is_down for engine in made[:-1]] == [True] * (num_starts - 1)
    if num_starts == 2:
        assert made[-1].vllm_config.speculative_config is None
    else:
        assert runner.drafter.propose() == [[]]


class _Config:
    """The part of vLLM 0.33's configuration that drops what it does not know."""

    def __init__(self, method: str) -> None:
        self.speculative_config = SimpleNamespace(method=method, schedule=[(1, 1, 8)])
        self._maybe_disable_dynamic_sd_for_v1()

    def _maybe_disable_dynamic_sd_for_v1(self) -> None:
        self.speculative_config.schedule = None


def test_our_drafts_stay_as_long_as_they_are_on_a_vllm_that_pads_unknown_ones() -> None:
    config_class = type("Config", (_Config,), dict(vars(_Config)))
    assert _keep_schedule(config_class)
    assert config_class("custom_class").speculative_config.schedule == [(1, 1, 8)]
    assert config_class("suffix").speculative_config.schedule is None
    assert not _keep_schedule(SimpleNamespace())  # a vLLM that drops nothing


def chunk_of(**sampling: Any) -> Chunk:
    return Chunk(
        chunk_id=ChunkId(1),
        request_id=RequestId("g/0"),
        group_id=GroupId("g"),
        instance_id=InstanceId(0),
        prompt=array("i", [5, 6]).tobytes(),
        generated=array("i", [7]).tobytes(),
        max_tokens=9,
        min_tokens=0,
        sampling=aseer.SamplingParams(**sampling).to_dict(),
        seed=None,
        num_reserved_blocks=1,
    )


async def test_prompts_go_to_vllm_in_no_form_that_it_warns_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of chunks, and of the steps that are measured for drafts; vLLM takes them in."""
    from vllm.v1.engine import input_processor

    config = await config_of(monkeypatch, make_tiny(tmp_path))
    processor = input_processor.InputProcessor(config)
    warned: list[str] = []
    for name in ("warning", "warning_once"):
        note: Any = lambda text, *args, **kwargs: warned.append(text)  # noqa: E731
        monkeypatch.setattr(input_processor.logger, name, note)
    taken: list[Any] = []

    class Engine:
        errored = False
        vllm_config = config

        async def generate(
            self, prompt: Any, params: Any, request_id: str, **_: Any
        ) -> Any:
            took = processor.process_inputs(
                request_id, prompt, params, supported_tasks=("generate",)
            )
            taken.append(took)
            output = SimpleNamespace(
                token_ids=[9],
                logprobs=SimpleNamespace(logprobs=[-1.0], start_indices=[0]),
                finish_reason="length",
            )
            yield SimpleNamespace(outputs=[output], num_cached_tokens=0)

    engine: Any = Engine()
    backend = VllmBackend(spec_of(tmp_path))
    backend._llm, backend._info = engine, info_of()
    end = await backend.run(chunk_of(detokenize=False), lambda **_: None)
    assert end.reason == "length", end.error
    await Speculation(engine, None)._profile_request(3, 2)
    assert [list(t.prompt_token_ids) for t in taken] == [[5, 6, 7], [4]]
    assert taken[0].cache_salt
    assert warned == []
    raw = {"prompt_token_ids": [5, 6, 7]}
    with suppress(TypeError, ValueError, KeyError):  # a vLLM that takes it no more
        async for _ in engine.generate(raw, taken[0].sampling_params, "raw"):
            pass
        assert "deprecated" in warned[0], "or this test says nothing"


async def test_tokens_that_end_a_response_are_told_with_its_end(tmp_path: Path) -> None:
    """If they were told before, a controller that loses the engine would go on."""
    from transformers import AutoTokenizer

    make_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    told: list[list[int]] = []
    at_abort: list[list[int]] = []

    class Engine:
        errored = False

        async def generate(self, *args: object, lora_request: object) -> Any:
            for token in (20, 21, 22):
                logprobs = SimpleNamespace(logprobs=[-1.0], start_indices=[0])
                output = SimpleNamespace(
                    token_ids=[token], logprobs=logprobs, finish_reason=None
                )
                yield SimpleNamespace(outputs=[output], num_cached_tokens=None)

        async def abort(self, request_id: str) -> None:
            at_abort.extend(told)

    def emit(*, tokens: Any = (), **others: object) -> None:
        told.append(list(tokens))

    backend = VllmBackend(spec_of(tmp_path))
    backend._llm = Engine()  # type: ignore[assignment]
    backend._tokenizer = tokenizer
    backend._info = info_of()
    end = await backend.run(chunk_of(stop=tokenizer.decode([21])), emit)
    assert (end.reason, told) == ("stop", [[20], [21]])
    assert at_abort == [[20]]


async def test_nothing_copies_from_an_engines_kv_when_it_sleeps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whichever vLLM: up to 0.32 it does not tell connectors."""
    from vllm.distributed.kv_transfer import kv_transfer_state

    told: list[str] = []
    connector = SimpleNamespace(rest_kv=lambda: told.append("rest"))

    class Engine:
        vllm_config = SimpleNamespace(
            device_config=SimpleNamespace(device_type="cuda"),
            model_config=SimpleNamespace(enable_sleep_mode=True),
        )

        async def collective_rpc(self, method: str) -> None:
            getattr(WorkerExtension(), method)()

        async def sleep(self, level: int) -> None:
            told.append(f"sleep {level}")

    backend = VllmBackend(spec_of(tmp_path))
    backend._llm = Engine()  # type: ignore[assignment]
    for its, expected in (
        (connector, ["rest", "sleep 1"]),
        (SimpleNamespace(), ["sleep 1"]),  # another's
        (None, ["sleep 1"]),
    ):
        monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", its)
        told.clear()
        await backend.sleep(1)
        assert told == expected
