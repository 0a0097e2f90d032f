"""A plugin of vLLM, loaded in every process of an engine under test.

vLLM finds it through `aseer_v2-1.dist-info`; `tests/e2e/v2/README.md` says how.
"""

from __future__ import annotations

import os

ASYNC = "ASEER_TEST_ASYNC_SCHEDULING"


def prepare() -> None:
    """Have this process do as on a GPU what vLLM does otherwise on a CPU."""
    from vllm.v1.sample.ops import topk_topp_sampler

    # The interpreter cannot run the kernel for top-k and top-p; torch can.
    topk_topp_sampler.HAS_TRITON = False
    if os.environ.get(ASYNC) == "1":
        _schedule_ahead()


def _schedule_ahead() -> None:
    """Leave asynchronous scheduling on, which vLLM switches off on CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__
    if getattr(check, "schedules_ahead", False):
        return

    def check_and_update_config(cls: type, vllm_config: object) -> None:
        scheduler = vllm_config.scheduler_config
        wanted = scheduler.async_scheduling
        check(cls, vllm_config)
        scheduler.async_scheduling = wanted

    check_and_update_config.schedules_ahead = True
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
