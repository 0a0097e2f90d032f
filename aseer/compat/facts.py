"""What aseer takes for granted of vLLM's and LMCache's behaviour, by the lines for it.

A fact is a line of their source. Where a release changed it, and aseer copes with both,
both are known, each from its release on; a newer release is expected to be as the
newest known one. A line that is none of these is a fact that changed: somebody must
read what it says now, and see what of aseer rests on it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Of a fact that is not there (yet, or any more).
NOWHERE = "(nowhere)"


class Fact(NamedTuple):
    """A line that must be as it was read.

    Attributes:
        says: what the line means for aseer.
        path: of the function, class or module that holds it.
        pattern: finds the line, in its own words; the first one counts.
        known: the line, from each release on; NOWHERE = there is none.
    """

    says: str
    feature: str
    module: str
    path: str
    pattern: str
    known: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def expected(self, release: tuple[int, ...]) -> str:
        """The line as it is known of a release, or of the newest known before it."""
        lines = [line for first, line in self.known if release >= first]
        return lines[-1] if lines else self.known[0][1]

    def first_line(self, lines: list[tuple[int, str]]) -> tuple[int, str] | None:
        """The line that matters, and its number."""
        for number, line in lines:
            if re.search(self.pattern, line):
                return number, " ".join(line.split())
        return None


_VLLM = "vllm.config.vllm"
_MP = "lmcache.integration.vllm.vllm_multi_process_adapter"

FACTS = (
    Fact(
        "an engine that is not told its use gets limits for an unknown one",
        "engines",
        "vllm.v1.engine.async_llm",
        "AsyncLLM.from_engine_args",
        r"usage_context: UsageContext",
        (((0, 26), "usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,"),),
    ),
    Fact(
        "`LLM` runs 1,024 requests at once on a large GPU",
        "engines",
        "vllm.engine.arg_utils",
        "EngineArgs.get_batch_defaults",
        r"LLM_CLASS: 1024",
        (((0, 26), "UsageContext.LLM_CLASS: 1024,"),),
    ),
    Fact(
        "workers are forked unless the environment says otherwise",
        "engines",
        "vllm.envs",
        "",
        r"^    VLLM_WORKER_MULTIPROC_METHOD:",
        (
            (
                (0, 26),
                'VLLM_WORKER_MULTIPROC_METHOD: Literal["fork", "spawn"] = "fork"',
            ),
        ),
    ),
    Fact(
        "expandable_segments is refused beside a KV connector",
        "the KV pool",
        _VLLM,
        "",
        r'if "expandable_segments:True" not in',
        (((0, 26), 'if "expandable_segments:True" not in os.environ.get('),),
    ),
    Fact(
        "engines schedule asynchronously unless something forbids it",
        "the KV pool",
        _VLLM,
        "",
        r"async_scheduling is None",
        (((0, 26), "elif self.scheduler_config.async_scheduling is None:"),),
    ),
    Fact(
        "CPUs never schedule asynchronously",
        "the KV pool",
        "vllm.platforms.cpu",
        "CpuPlatform",
        r"async_scheduling = ",
        (((0, 26), "scheduler_config.async_scheduling = False"),),
    ),
    Fact(
        "model runner V2 takes no drafter of ours, so ours is put in for `ngram_gpu`",
        "speculation",
        _VLLM,
        "",
        r'"custom_class"',
        (
            ((0, 26), NOWHERE),  # there it names what V2 does take
            ((0, 30), '"custom_class",'),
            (
                (0, 33),
                'if speculative_config.method in ("suffix", "custom_class"):',
            ),
        ),
    ),
    Fact(
        "V2's scheduler, ahead of the device, takes what was not verified for rejected",
        "speculation on GPUs",
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        r"num_rejected = ",
        (((0, 26), "num_rejected = num_draft_tokens - num_accepted"),),
    ),
    Fact(
        "V2 draws a token with noise of the request's seed and the token's place alone",
        "speculation on GPUs",
        "vllm.v1.worker.gpu.sample.gumbel",
        "gumbel_block_argmax",
        r"seed = ",
        (
            (
                (0, 26),
                "seed = tl.load(seeds_ptr + req_state_idx, mask=is_valid_req, other=0)",
            ),
        ),
    ),
    Fact(
        "asynchronous scheduling is for drafters on the device, `ngram_gpu` among them",
        "speculation on GPUs",
        "vllm.config.speculative",
        "",
        r"^NgramGPUTypes = ",
        (((0, 26), 'NgramGPUTypes = Literal["ngram_gpu"]'),),
    ),
    Fact(
        "V2 captures whole graphs for each number of drafts in the schedule, none too",
        "speculation on GPUs",
        "vllm.v1.worker.gpu.cudagraph_utils",
        "CudaGraphManager._init_candidates",
        r"uses_dynamic_speculative_decoding",
        (
            (
                (0, 26),
                "and speculative_config.uses_dynamic_speculative_decoding()",
            ),
        ),
    ),
    Fact(
        "model runner V1 drops the schedule by which `unpadded` keeps drafts ragged",
        "speculation",
        _VLLM,
        "",
        r"def _maybe_disable_dynamic_sd_for_v1",
        (
            ((0, 26), NOWHERE),
            ((0, 33), "def _maybe_disable_dynamic_sd_for_v1(self) -> None:"),
        ),
    ),
    Fact(
        "when a step's metadata of drafts is built",
        "speculation",
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        r"use_spec_decode = ",
        (
            (
                (0, 26),
                "use_spec_decode = len(scheduler_output.scheduled_spec_decode_tokens)"
                " > 0",
            ),
            ((0, 32), "use_spec_decode = self.speculative_config is not None"),
        ),
    ),
    Fact(
        "a step that computes nothing stores nothing: late stores go with the loads",
        "the KV pool",
        "vllm.v1.worker.kv_connector_model_runner_mixin",
        "KVConnectorModelRunnerMixin.kv_connector_no_forward",
        r"wait_for_save",
        (
            ((0, 26), "scheduler_output, wait_for_save=False"),
            ((0, 31), NOWHERE),
        ),
    ),
    Fact(
        "a prompt without a type is deprecated",
        "engines",
        "vllm.v1.engine.input_processor",
        "",
        r"Passing raw prompts to InputProcessor",
        (((0, 26), '"Passing raw prompts to InputProcessor is deprecated "'),),
    ),
    Fact(
        "who copies KV is LMCache's choice unless it is told",
        "the KV pool",
        _MP,
        "ExtraConfigDefault",
        r"mp_transfer_mode = ",
        (((0, 5), 'mp_transfer_mode = "auto"'),),
    ),
    Fact(
        "LMCache reports stores that are not done when its server is unhealthy",
        "the KV pool",
        _MP,
        "LMCacheMPWorkerAdapter.get_finished",
        r"finished_stores = set\(self\.store_futures",
        (((0, 5), "finished_stores = set(self.store_futures.keys())"),),
    ),
    Fact(
        "LMCache goes on without its CUDA kernels",
        "the KV pool",
        "lmcache.v1.platform.devices.cuda.device_ops",
        "CudaDeviceOps.ensure_native",
        r"except ImportError",
        (((0, 5), "except ImportError:"),),
    ),
    Fact(
        "LMCache publishes what a forgotten worker had reserved",
        "the KV pool",
        "lmcache.v1.multiprocess.modules.engine_driven_transfer",
        "EngineDrivenTransferModule._release_entry",
        r"finish_write\(",
        (((0, 5), "self._ctx.storage_manager.finish_write(obj_keys)"),),
    ),
    Fact(
        "a hybrid model's KV cannot be copied by its engine",
        "the KV pool",
        "lmcache.v1.multiprocess.transfer_context.worker_transfer",
        "_single_group_block_ids",
        r"does not support hybrid",
        (
            (
                (0, 5),
                '"engine-driven transfer does not support hybrid KV cache groups"',
            ),
        ),
    ),
)
