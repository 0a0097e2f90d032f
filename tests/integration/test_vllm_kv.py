"""Chunks that aseer admits, in vLLM's own scheduler: no KV of them is ever dropped.

The scheduler is vLLM's, with its KV cache manager and without a model: each step's
tokens are drawn. So what aseer reserves is compared with what vLLM takes, for what the
layers of every family keep, in seconds and without weights.
"""

from __future__ import annotations

import math
import random
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

pytest.importorskip("vllm")

from aseer.controller import Controller
from aseer.core.commands import Dispatch, Finished
from aseer.instance.vllm.kvgroups import describe_groups
from aseer.instance.vllm.speculation import unpadded
from aseer.models.tiny import make_tiny
from aseer.types import ChunkEnd, ChunkProgress, GroupId, InstanceId, InstanceInfo, Task

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from aseer.core.commands import Command
    from aseer.types import Chunk, ChunkId

BATCHED_TOKENS = 256
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
NUM_DRAFTED = 16
NUM_GROUPS = 12


class Family(NamedTuple):
    """What a family's layers keep, as vLLM groups them.

    Attributes:
        num_windows, num_states: groups of each; all have one group of full attention
            but `only_windows`.
        keeps_prompts: a prompt's last block is kept by a state's kernel, as Mamba2's.
    """

    block_size: int
    num_windows: int = 0
    num_states: int = 0
    window: int = 64
    only_windows: bool = False
    keeps_prompts: bool = False

    def specs(self, num_drafted: int) -> list[Any]:
        import torch
        from vllm.v1 import kv_cache_interface as kv

        heads: dict[str, Any] = {
            "num_kv_heads": 2,
            "head_size": 64,
            "dtype": torch.float32,
            "block_size": self.block_size,
        }
        full = [] if self.only_windows else [kv.FullAttentionSpec(**heads)]
        window = kv.SlidingWindowSpec(sliding_window=self.window, **heads)
        state = kv.MambaSpec(
            block_size=self.block_size,
            shapes=((4, 4),),
            dtypes=(torch.float32,),
            page_size_padded=full[0].page_size_bytes if full else None,
            mamba_cache_mode="align",
            num_speculative_blocks=num_drafted,
            num_prefill_checkpoint_blocks=int(self.keeps_prompts),
            prefill_checkpoint_alignment=1 if self.keeps_prompts else None,
        )
        return full + [window] * self.num_windows + [state] * self.num_states


FAMILIES = {
    "llama": Family(32),
    "gemma3_text": Family(32, num_windows=5),
    "gemma2": Family(32, num_windows=1),
    "gpt_oss": Family(32, num_windows=1),
    "long_windows": Family(16, num_windows=1, window=512),
    "mistral": Family(32, num_windows=1, only_windows=True),
    "granitemoehybrid": Family(160, num_states=3, keeps_prompts=True),
    "small_states": Family(32, num_states=3, keeps_prompts=True),
    "qwen3_next": Family(96, num_states=3),
    "lfm2": Family(32, num_states=3),
    "all_kinds": Family(32, num_windows=2, num_states=2),
}


class FakeEngine:
    """vLLM's scheduler over so many blocks, with tokens drawn instead of computed.

    Attributes:
        num_preemptions: so far.
        most_used: of the blocks that requests may reserve, at any time so far.
    """

    def __init__(
        self, model: Path, family: Family, num_blocks: int, num_drafted: int
    ) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        args: dict[str, Any] = {}
        if num_drafted:
            drafter = "aseer.dgds.proposer.GroupDrafter"
            settings = {"method": "custom_class", "model": drafter}
            settings["num_speculative_tokens"] = num_drafted
            args["speculative_config"] = unpadded(settings)
        config = EngineArgs(
            model=str(model),
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=BATCHED_TOKENS,
            enable_prefix_caching=True,
            **args,
        ).create_engine_config()
        config.cache_config.block_size = family.block_size
        config.cache_config.mamba_cache_mode = "align" if family.num_states else "none"
        config.cache_config.num_gpu_blocks = num_blocks
        specs = family.specs(num_drafted)
        plan = KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)
            ],
        )
        sizes = kv_cache_utils.resolve_kv_cache_block_sizes(plan, config)
        hash_with = get_hash_fn_by_name("sha256")
        kv_cache_utils.init_none_hash(hash_with)
        self._hasher = kv_cache_utils.get_request_block_hasher(sizes[1], hash_with)
        self._scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=plan,
            structured_output_manager=StructuredOutputManager(config),
            block_size=sizes[0],
            hash_block_size=sizes[1],
            log_stats=True,
        )
        self._rng = random.Random(1)
        self._num_drafted = num_drafted
        self._num_blocks = num_blocks
        self._chunks: dict[str, ChunkId] = {}
        self._num_reported: dict[str, int] = {}
        self.num_preemptions = 0
        self.most_used = 0.0
        groups, num_set_aside = describe_groups(
            specs,
            batched_tokens=config.scheduler_config.max_num_batched_tokens,
            step_tokens=1 + num_drafted,
            num_steps=config.max_concurrent_batches,
            max_num_seqs=MAX_NUM_SEQS,
            hash_tokens=sizes[1],
        )
        self.info = InstanceInfo(
            instance_id=InstanceId(0),
            num_kv_blocks=num_blocks - 1 - num_set_aside,
            block_size=math.lcm(*(group.block_size for group in groups)),
            max_num_seqs=MAX_NUM_SEQS,
            max_model_len=MAX_MODEL_LEN,
            shares_prompts=True,
            kv_groups=tuple(groups),
        )

    def run(self, chunk: Chunk) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        request_id = f"{chunk.request_id}#{chunk.chunk_id}"
        self._chunks[request_id] = chunk.chunk_id
        self._num_reported[request_id] = 0
        params = SamplingParams(max_tokens=chunk.max_tokens, ignore_eos=True)
        params.update_from_generation_config({}, None)
        self._scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=array("i", chunk.prompt + chunk.generated).tolist(),
                sampling_params=params,
                pooling_params=None,
                block_hasher=self._hasher,
            )
        )

    def step(self) -> list[ChunkProgress]:
        """One step of the engine: what it generates, chunk by chunk."""
        from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

        scheduler = self._scheduler
        planned = scheduler.schedule()
        self.num_preemptions += len(planned.preempted_req_ids or ())
        used = scheduler.kv_cache_manager.usage * (self._num_blocks - 1)
        self.most_used = max(self.most_used, used / self.info.num_kv_blocks)
        ids = list(planned.num_scheduled_tokens)
        sampled = [self._sample(i, planned) for i in ids]
        outputs = scheduler.update_from_output(
            planned,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={id_: i for i, id_ in enumerate(ids)},
                sampled_token_ids=sampled,
            ),
        )
        if self._num_drafted:
            drafts = [
                self._tokens(self._rng.randrange(self._num_drafted + 1)) for _ in ids
            ]
            scheduler.update_draft_token_ids(DraftTokenIds(ids, drafts))
        return [
            self._report(output)
            for batch in outputs.values()
            for output in batch.outputs
        ]

    def _sample(self, request_id: str, planned: Any) -> list[int]:
        request = self._scheduler.requests[request_id]
        if request.is_prefill_chunk:
            return []
        drafted = planned.scheduled_spec_decode_tokens.get(request_id, ())
        return self._tokens(1 + self._rng.randrange(len(drafted) + 1))

    def _tokens(self, num: int) -> list[int]:
        return [self._rng.randrange(3, 100) for _ in range(num)]

    def _report(self, output: Any) -> ChunkProgress:
        tokens = array("i", output.new_token_ids)
        start = self._num_reported[output.request_id]
        self._num_reported[output.request_id] += len(tokens)
        is_over = output.finish_reason is not None
        return ChunkProgress(
            chunk_id=self._chunks[output.request_id],
            start=start,
            tokens=tokens.tobytes(),
            logprobs=array("f", [0.0] * len(tokens)).tobytes(),
            num_cached_tokens=0 if start == 0 else None,
            end=ChunkEnd(reason="length") if is_over else None,
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


def tasks_of(seed: int) -> list[Task]:
    rng = random.Random(seed)
    tasks = []
    for i in range(NUM_GROUPS):
        prompt = array(
            "i", (rng.randrange(3, 100) for _ in range(rng.randrange(5, 300)))
        )
        tasks.append(
            Task(
                group_id=GroupId(f"g{i}"),
                num_requests=rng.choice([1, 2, 4]),
                prompt=prompt.tobytes(),
                num_prompt_tokens=len(prompt),
                max_tokens=rng.randrange(1, 500),
            )
        )
    return tasks


def run_all(engine: FakeEngine, tasks: list[Task], chunk_size: int) -> int:
    """Run a rollout to its end; how many responses came."""
    controller = Controller(policy="context-aware", chunk_size=chunk_size)
    num_finished = 0

    def act(commands: Iterable[Command]) -> None:
        nonlocal num_finished
        for command in commands:
            if isinstance(command, Dispatch):
                engine.run(command.chunk)
            elif isinstance(command, Finished):
                assert command.response.finish_reason == "length"
                num_finished += 1

    act(controller.instance_up(engine.info, 0.0))
    act(controller.add_groups(tasks, 0.0))
    while controller.num_unfinished:
        act(controller.progress(engine.step(), 0.0))
        controller.check_integrity()
    return num_finished


@pytest.mark.parametrize(("num_drafted", "chunk_size"), [(0, 0), (NUM_DRAFTED, 96)])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_admitted_chunk_is_preempted_and_the_room_is_used(
    model: Path, name: str, num_drafted: int, chunk_size: int
) -> None:
    family = FAMILIES[name]
    # Room for six requests of 1,000 tokens, and for many more of the others.
    of_window = -(-family.window // family.block_size) + 2
    each = family.num_windows * of_window + family.num_states * (2 + num_drafted)
    each += 0 if family.only_windows else -(-1000 // family.block_size)
    set_aside = family.num_windows * BATCHED_TOKENS // family.block_size
    if family.keeps_prompts:
        set_aside += family.num_states * 2 * BATCHED_TOKENS // family.block_size
    engine = FakeEngine(model, family, 6 * each + set_aside, num_drafted)
    tasks = tasks_of(3)
    num = run_all(engine, tasks, chunk_size)
    assert num == sum(task.num_requests for task in tasks)
    assert engine.num_preemptions == 0
    assert engine.most_used > 0.4
