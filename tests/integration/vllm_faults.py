"""What is wrong with vLLM, shown by its own code with each of aseer's patches and
without. Run in a process of its own, which the patches change.

    python -m tests.integration.vllm_faults

prints, for each patch that needs no running engine, whether the fault was there,
whether the patch was applied, and whether the fault was there behind it.
"""

from __future__ import annotations

import json
import sys
from inspect import getsource, signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import zmq
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from aseer.dgds import sampler as drawing
from aseer.dgds.proposer import GroupDrafter
from aseer.dgds.stepclock import StepClock
from aseer.instance.vllm import EXECUTOR, patches
from aseer.instance.vllm.executor import DraftingExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


def keep_schedule() -> Callable[[], bool]:
    drop = "_maybe_disable_dynamic_sd_for_v1"

    def is_dropped() -> bool:
        if not hasattr(VllmConfig, drop):
            return False
        speculative = SimpleNamespace(
            method="custom_class", num_speculative_tokens_per_batch_size=[(1, 1, 8)]
        )
        config = SimpleNamespace(
            speculative_config=speculative, use_v2_model_runner=False
        )
        getattr(VllmConfig, drop)(config)
        return speculative.num_speculative_tokens_per_batch_size is None

    return is_dropped


def poll_less() -> Callable[[], bool]:
    def polls_for_long() -> bool:
        with zmq.Context() as context:
            waiting = SpinCondition(True, context, "tcp://127.0.0.1:9")
            sockets = [v for v in vars(waiting).values() if isinstance(v, zmq.Socket)]
            for socket in sockets:
                socket.close(linger=0)
            return waiting.busy_loop_s > 2 * patches._POLL_S

    return polls_for_long


def spare_generators() -> Callable[[], bool]:
    class Passed(Exception):
        """vLLM came past the generators."""

    class Batch(SimpleNamespace):
        @property
        def req_ids(self) -> Any:
            raise Passed

    # A step, of which only the part behind its forward pass is left.
    GPUModelRunner.sample_tokens = lambda runner: GPUModelRunner._bookkeeping_sync(
        runner, None, SimpleNamespace(sampled_token_ids=None), None, None, 1
    )

    def dies() -> bool:
        runner = SimpleNamespace(
            input_batch=Batch(num_reqs=1, generators={0: torch.Generator(CPU)}),
            discard_request_mask=SimpleNamespace(np=np.array([True])),
        )
        try:
            GPUModelRunner.sample_tokens(runner)
        except Passed:
            return False
        except RuntimeError as error:
            return "offset" in str(error)
        finally:
            assert 0 in runner.input_batch.generators
        raise AssertionError("vLLM's bookkeeping no longer looks at req_ids")

    return dies


def keep_masks_apart() -> Callable[[], bool]:
    """A batch in which one request of three may generate token 5 only."""

    def batch_of(names: str) -> Any:
        wanted = signature(InputBatch).parameters
        given = {
            "max_num_reqs": 4,
            "max_model_len": 16,
            "max_num_batched_tokens": 16,
            "device": CPU,
            "vocab_size": 8,
            "block_sizes": [16],
            "kernel_block_sizes": [16],
            "max_num_blocks_per_req": [1],
        }
        batch = InputBatch(**{k: v for k, v in given.items() if k in wanted})
        for name in names:
            add(batch, name)
        return batch

    def add(batch: Any, name: str) -> None:
        allowed = [5] if name == "a" else None
        request = CachedRequestState(
            req_id=name,
            prompt_token_ids=[1],
            mm_features=[],
            sampling_params=SamplingParams(allowed_token_ids=allowed),
            generator=None,
            block_ids=([0],),
            num_computed_tokens=0,
            output_token_ids=[],
        )
        batch.add_request(request)
        batch.refresh_metadata()

    def is_right(batch: Any) -> bool:
        masks = batch.allowed_token_ids_mask_cpu_tensor
        return all(
            bool(masks[row].any()) == (name == "a")
            for name, row in batch.req_id_to_index.items()
        )

    def mixes_up() -> bool:
        moved = batch_of("xya")
        moved.remove_request("x")
        moved.condense()  # "a" has the row of "x" now
        moved.refresh_metadata()
        add(moved, "z")  # in the row that "a" had
        swapped = batch_of("xya")
        swapped.swap_states(0, 2)
        assert set(moved.req_id_to_index) == set("yaz")
        return not (is_right(moved) and is_right(swapped))

    return mixes_up


def verify_by_sampling(runner: Any) -> Callable[[], bool]:
    runner.drafter = object.__new__(GroupDrafter)
    runner.sampler = Sampler("processed_logprobs")
    runner.rejection_sampler = rejection_sampler.RejectionSampler(runner.sampler)
    logits = torch.randn(4, 24, generator=torch.Generator(CPU).manual_seed(1))

    def first_token(seed: int, drafts: list[int]) -> int:
        metadata = drawing._draft_metadata([drafts], CPU)
        settings = drawing._sampling_metadata([drawing.TESTED[0]], CPU)
        settings.generators = {0: torch.Generator(CPU).manual_seed(seed)}
        rows = logits[: len(drafts) + 1].clone()
        if not drafts:
            return int(runner.sampler(rows, settings).sampled_token_ids[0, 0])
        drawn = runner.rejection_sampler(metadata, None, rows, settings)
        return int(drawn.sampled_token_ids[0, 0])

    def drafts_change_what_is_sampled() -> bool:
        likely = logits.argmax(1).tolist()
        return any(
            first_token(seed, []) != first_token(seed, likely[:3]) for seed in range(50)
        )

    return drafts_change_what_is_sampled


def expand_settings_rightly(runner: Any) -> Callable[[], bool]:
    runner.device = CPU

    def is_wrong() -> bool:
        expand = rejection_sampler.expand_batch_to_tokens
        return not patches.expands_rightly(expand, CPU)

    return is_wrong


def draft_near_the_end(runner: Any) -> Callable[[], bool]:
    runner.num_spec_tokens = 8
    runner.effective_drafter_max_model_len = 100
    runner.speculative_config = SimpleNamespace(use_dflash=lambda: False)

    def gets_no_drafts() -> bool:
        longest = SimpleNamespace(max_seq_len=97)
        return not GPUModelRunner._input_fits_in_drafter(runner, longest)

    return gets_no_drafts


def time_steps(runner: Any) -> Callable[[], bool]:
    runner.aseer_clock = clock = StepClock()
    runner.execute_model = lambda scheduled: None
    runner.use_async_scheduling = False
    runner.speculative_config = SpeculativeConfig.__new__(SpeculativeConfig)
    runner.speculative_config.method = "custom_class"
    runner.input_batch = SimpleNamespace(num_tokens_no_spec=[], token_ids_cpu=[])
    told: list[Any] = []
    runner.drafter = SimpleNamespace(
        propose=lambda *args, **named: told.append((args, named))
    )

    def is_untold() -> bool:
        scheduled = SimpleNamespace(
            total_num_scheduled_tokens=7,
            scheduled_spec_decode_tokens={},
            num_scheduled_tokens={},
            num_spec_tokens_to_schedule=8,
        )
        runner.execute_model(scheduled)
        nothing = dict.fromkeys(
            list(signature(GPUModelRunner.propose_draft_token_ids).parameters)[1:]
        )
        GPUModelRunner.propose_draft_token_ids(
            runner,
            **nothing | {"scheduler_output": scheduled, "sampled_token_ids": []},
        )
        args, named = told.pop()
        is_told_nothing = args == ([], [], []) and named == {"slot_mappings": None}
        return is_told_nothing and not clock.num_tokens

    return is_untold


def send_drafts_along(runner: Any) -> Callable[[], bool]:
    parallel = SimpleNamespace(distributed_executor_backend=EXECUTOR)
    runner.vllm_config = SimpleNamespace(parallel_config=parallel)
    runner.sample_tokens = lambda: SimpleNamespace()
    runner.take_draft_token_ids = lambda: "drafts"

    def is_asked_apart() -> bool:
        calls: list[str] = []
        told: list[Any] = []

        def collective_rpc(method: str, **_: Any) -> Any:
            calls.append(method)
            return getattr(runner, method)()

        executor = object.__new__(DraftingExecutor)
        executor.collective_rpc = collective_rpc
        executor.output_rank = 0
        executor.kv_output_aggregator = None
        executor._last_output = runner.sample_tokens()
        engine = SimpleNamespace(
            check_for_draft_tokens=True,
            async_scheduling=False,
            model_executor=executor,
            scheduler=SimpleNamespace(update_draft_token_ids=told.append),
        )
        EngineCore.post_step(engine, model_executed=True)
        assert told == ["drafts"]
        return bool(calls)

    return is_asked_apart


def take_undrafted_steps_as_plain(runner: Any) -> Callable[[], bool]:
    runner.model_config = SimpleNamespace(is_hybrid=False)
    runner.speculative_config = SimpleNamespace()
    line = "use_spec_decode = self.speculative_config is not None"
    asks_its_settings = line in getsource(GPUModelRunner._prepare_inputs)
    runner._prepare_inputs = lambda scheduled: runner.speculative_config is not None

    def is_taken_as_drafted() -> bool:
        drafted = SimpleNamespace(scheduled_spec_decode_tokens={"r": [1]})
        assert runner._prepare_inputs(drafted)
        plain = SimpleNamespace(scheduled_spec_decode_tokens={})
        return asks_its_settings and runner._prepare_inputs(plain)

    return is_taken_as_drafted


def draft_nothing(runner: Any) -> Callable[[], bool]:
    runner.drafter = SimpleNamespace(propose=lambda sampled: [[1, 2] for _ in sampled])
    runner.input_batch = SimpleNamespace(req_ids=["r"])
    calls = [
        name
        for name in dir(AsyncLLM)
        if "spec_" in name or ("draft" in name and "weight" not in name)
    ]

    def drafts() -> bool:
        return not calls and any(runner.drafter.propose([[5]]))

    return drafts


def shown(patch: Any) -> list[bool]:
    """Whether the fault is there, the patch applies, and the fault is there then."""
    targets = [] if patch.moment in ("configure", "worker") else [SimpleNamespace()]
    is_there = globals()[patch.name](*targets)
    return [is_there(), patch.apply(*targets), is_there()]


if __name__ == "__main__":
    current_platform.import_kernels()
    # Older releases have none.
    if current_platform.register_triton_kernel_overrides is not None:
        current_platform.register_triton_kernel_overrides()
    torch.set_num_threads(1)
    found = {p.name: shown(p) for p in patches.PATCHES if p.moment != "reload"}
    sys.stdout.write(json.dumps(found) + "\n")
