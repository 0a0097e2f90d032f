"""verl's own trainer on a CPU, for tests; `VERL_USE_EXTERNAL_MODULES=verl_cpu`.

Nothing of verl's is replaced but what asks for a GPU: a platform is registered by its
own registry, and torch.distributed is asked for gloo once, where verl names it twice.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import ModuleType

import patient_ray  # noqa: F401
import torch
import torch.distributed as dist
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_NUMBERS = ("memory_allocated", "memory_reserved")
_NO_OPS = ("empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "set_device")


class _Device(ModuleType):
    """torch.cpu, with what verl asks of a device and a CPU lacks."""

    def __getattr__(self, name: str):
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        bare = name.removeprefix("max_").removeprefix("reset_peak_")
        if bare in _NUMBERS:
            return lambda *_, **__: 0
        if bare in (*_NO_OPS, "memory_stats"):
            return lambda *_, **__: None
        if name == "mem_get_info":
            return lambda *_, **__: (1 << 34, 1 << 35)
        if name == "get_device_name":
            return lambda *_, **__: "CPU"
        raise AttributeError(f"a CPU has no {name}")


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _Device("cpu_as_verl_wants_it")

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"  # verl counts no others; Ray is told that there are some

    def ray_resource_options(self, num_gpus):
        return {"num_gpus": num_gpus}

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


_init_process_group = dist.init_process_group


def _init_with_gloo(backend=None, *args, **kwargs):
    named_twice = backend == "cpu:gloo,cpu:gloo"
    return _init_process_group("gloo" if named_twice else backend, *args, **kwargs)


dist.init_process_group = _init_with_gloo
