"""The connector under vLLM's own two schedulers; the model and the server are fakes.

No engine is started: the schedulers run here, and what a worker would be told is looked
at. CPU engines never schedule asynchronously, and GPU engines do by default.
"""

from __future__ import annotations

import math
import re
import warnings
from array import array
from collections import deque
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("lmcache")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they use and is deprecated
    import torch
    from lmcache.integration.vllm import lmcache_mp_connector
    from lmcache.integration.vllm.utils import mm_hash_to_token_values
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    from aseer.kv import connector
    from aseer.kv.connector import LATE_STORES, TransferStats
    from aseer.kv.idle import IdleConnector
    from aseer.kv.settings import (
        CHUNK_KEY,
        CONNECTOR,
        CONNECTOR_MODULE,
        TIMEOUT_KEY,
    )

from aseer.inputs.prompt_image import PromptImage
from aseer.kv.images import pool_tokens
from aseer.models.tiny import make_tiny

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BLOCK, CHUNK, NUM_BLOCKS = 32, 128, 64


class FakeServer:
    """What the scheduler's half of the connector sees of a pool: nothing is found."""

    lmcache_tokens_per_chunk = CHUNK

    def __init__(self, *, vllm_block_size: int, **_: Any) -> None:
        if CHUNK % vllm_block_size:  # as LMCache's own adapter does
            raise ValueError(f"--chunk-size must be a multiple of {vllm_block_size}")
        self._health_events: dict[str, Any] = {}
        self.num_resets = 0

    def maybe_submit_lookup_request(self, *args: Any, **kwargs: Any) -> None: ...
    def check_lookup_result(self, request_id: str) -> int:
        return 0

    def cleanup_lookup_result(self, request_id: str) -> None: ...
    def free_lookup_locks(self, **kwargs: Any) -> None: ...
    def end_session(self, request_id: str) -> None: ...
    def shutdown(self) -> None: ...
    def reset_cache(self) -> bool:
        self.num_resets += 1
        return True


class Engine:
    """A scheduler, and a model that says a new token for every row of a step."""

    def __init__(
        self, model: Path, *, is_async: bool, block_sizes: Sequence[int] = (BLOCK,)
    ) -> None:
        """`block_sizes` are what vLLM has chosen, of each group of layers."""
        block, unit = math.lcm(*block_sizes), math.gcd(*block_sizes)
        config = EngineArgs(
            model=str(model),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=4,
            block_size=block,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=True,
            enforce_eager=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector=CONNECTOR,
                kv_role="kv_both",
                kv_connector_module_path=CONNECTOR_MODULE,
                kv_connector_extra_config={
                    "lmcache.mp.save_decode_cache": True,
                    TIMEOUT_KEY: 5.0,
                    CHUNK_KEY: CHUNK,
                },
            ),
        ).create_engine_config()
        config.scheduler_config.async_scheduling = is_async
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        groups = [
            KVCacheGroupSpec(
                [f"layer {i}"],
                FullAttentionSpec(
                    block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32
                ),
            )
            for i, size in enumerate(block_sizes)
        ]
        self.scheduler = (AsyncScheduler if is_async else Scheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=NUM_BLOCKS,
                kv_cache_tensors=[],
                kv_cache_groups=groups,
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block,
            hash_block_size=unit,
            log_stats=False,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(unit, sha256)
        self._depth = 2 if is_async else 1  # steps under way at once
        self._tokens = count(1000)
        self.stored: list[tuple[int, int]] = []
        self.blocks: dict[int, list[int]] = {}  # of each store, by its start

    def run(self, prompt: list[int], max_tokens: int) -> Request:
        """Run a request to its end, and the step that clears up after it."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = Request(
            request_id=f"r{next(self._tokens)}",
            prompt_token_ids=prompt,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        under_way: deque[Any] = deque()
        while self.scheduler.has_requests() or under_way:
            if len(under_way) < self._depth and self.scheduler.has_requests():
                under_way.append(self._step())
            if len(under_way) == self._depth or not (
                self.scheduler.has_unfinished_requests()
            ):
                step = under_way.popleft()
                self.scheduler.update_from_output(step, self._answer(step))
        return request

    def _step(self) -> Any:
        step = self.scheduler.schedule()
        meta = step.kv_connector_metadata
        requests = getattr(meta, "requests", [])
        stores = [r for r in requests if r.direction == "STORE"]
        for store in stores + getattr(meta, LATE_STORES, []):
            self.stored.append((store.op.start, store.op.end))
            self.blocks[store.op.start] = store.op.flat_block_ids
        return step

    def _answer(self, step: Any) -> ModelRunnerOutput:
        ids = list(step.num_scheduled_tokens)
        is_idle = isinstance(self.scheduler.connector, IdleConnector)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: i for i, name in enumerate(ids)},
            sampled_token_ids=[[next(self._tokens)] for _ in ids],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=KVConnectorOutput(
                finished_sending=set() if is_idle else set(step.finished_req_ids)
            ),
        )


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lmcache_mp_connector, "LMCacheMPSchedulerAdapter", FakeServer)
    # It is for the rest of a process's life, and this one has other tests to run.
    monkeypatch.setattr(connector.patches, "apply", lambda process: [])
    no_sockets = SimpleNamespace(Context=SimpleNamespace(instance=lambda: None))
    monkeypatch.setattr(lmcache_mp_connector, "zmq", no_sockets)
    return make_tiny(tmp_path)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_chunks_whole_kv_is_stored_so_that_its_resume_computes_one_token(
    model: Path, is_async: bool
) -> None:
    engine = Engine(model, is_async=is_async)
    request = engine.run(list(range(5, 105)), max_tokens=3 * CHUNK + 1 - 100)
    assert request.num_tokens == 3 * CHUNK + 1
    assert engine.stored == [(0, 128), (128, 256), (256, 384)]
    held = [block for start in (0, 128, 256) for block in engine.blocks[start]]
    assert len(set(held)) == len(held) == 3 * CHUNK // BLOCK
    # A chunk that ends within a pool's chunk has nothing more to store.
    engine.stored.clear()
    engine.run(list(range(200, 300)), max_tokens=CHUNK)
    assert engine.stored == [(0, 128)]


@pytest.mark.parametrize(
    ("block_sizes", "why"),
    [
        ((96,), r"blocks of 96 tokens.*kv_pool=\{'chunk_tokens': 384\}"),
        ((256,), r"blocks of 256 tokens.*kv_pool=\{'chunk_tokens': 256\}"),
        ((32, 64), "2 groups of layers, with blocks of 32, 64 tokens"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_engine_whose_blocks_the_pool_cannot_hold_runs_without_it(
    model: Path, is_async: bool, block_sizes: tuple[int, ...], why: str
) -> None:
    engine = Engine(model, is_async=is_async, block_sizes=block_sizes)
    assert isinstance(engine.scheduler.connector, IdleConnector)
    assert re.search(why, engine.scheduler.connector.why_no_pool)
    request = engine.run(list(range(5, 105)), max_tokens=300)
    assert request.num_tokens == 400
    assert engine.stored == []
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)


def test_an_engine_that_sleeps_leaves_the_others_their_pool(model: Path) -> None:
    engine = Engine(model, is_async=False)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.scheduler.connector.scheduler_adapter.num_resets == 0


def test_an_engines_times_are_those_of_one_worker_and_its_failures_are_of_all() -> None:
    engine = TransferStats()
    for _ in range(4):
        worker = TransferStats()
        worker.add_of_worker(4, store_s=2.0, num_failures=1)
        engine.aggregate(worker)
    assert engine.data == {"store_s": 2.0, "num_failures": 4}


def test_an_images_tokens_are_those_of_lmcache() -> None:
    ids = array("i", range(25))
    images = [
        PromptImage(key="one", path="", start=1, num_tokens=3),
        PromptImage(key="other", path="", start=5, num_tokens=20),
    ]
    found = pool_tokens(ids.tobytes(), images)
    ids[1:4] = array("i", mm_hash_to_token_values("one", 3))
    ids[5:25] = array("i", mm_hash_to_token_values("other", 20))
    assert found == ids.tobytes()
