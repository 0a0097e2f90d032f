"""What SkyRL 0.3 lacks to run on CPUs, and an environment for the test.

Imported before SkyRL, in each of its processes (`sitecustomize`). Nothing of its
generators, weights or training is touched.
"""

from __future__ import annotations

import ctypes.util
import sys
import typing

import datasets
import patient_ray  # noqa: F401
import skyrl_gym
import torch
import torch.distributed as dist
import torch.distributed.device_mesh as meshes
import typing_extensions
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from transformers.utils import import_utils

# What stands in for flash-attn is of no distribution, and not to be used.
import_utils.PACKAGE_DISTRIBUTION_MAPPING["flash_attn"] = ["a stand-in"]

if sys.version_info < (3, 12):  # pydantic refuses the older one
    typing.TypedDict = typing_extensions.TypedDict

CPU = torch.device("cpu")
torch.cuda.current_device = lambda: CPU
torch.cuda.device_count = lambda: 1
torch.cuda.mem_get_info = lambda *_: (1 << 34, 1 << 35)
# A function each: torch keeps a table of them.
for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
    setattr(torch.cuda, name, lambda *_: None)
for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
    setattr(torch.cuda, name, lambda *_: 0)
torch.Tensor.cuda = lambda self, *_, **__: self

_find_library = ctypes.util.find_library
_empty = torch.empty
_init_device_mesh = meshes.init_device_mesh
_init_process_group = dist.init_process_group


def empty(*args, device=None, **kwargs):
    return _empty(*args, device="cpu" if device == "cuda" else device, **kwargs)


def init_device_mesh(device_type, *args, **kwargs):
    device_type = "cpu" if device_type == "cuda" else device_type
    return _init_device_mesh(device_type, *args, **kwargs)


def init_process_group(backend=None, *args, **kwargs):
    backend = "gloo" if backend and "cuda" in backend else backend
    return _init_process_group(backend, *args, **kwargs)


def find_library(name):
    if name == "numa":  # SkyRL then goes without binding to a GPU's memory
        raise OSError("there are no GPUs")
    return _find_library(name)


torch.empty = empty
ctypes.util.find_library = find_library
meshes.init_device_mesh = dist.init_device_mesh = init_device_mesh
dist.init_process_group = init_process_group

# Eight processes would import SkyRL to look at eight prompts.
_filter = datasets.Dataset.filter
datasets.Dataset.filter = lambda self, *args, num_proc=None, **kwargs: _filter(
    self, *args, **kwargs
)


class Letters(BaseTextEnv):
    """Rewards the share of letters, which a random model learns in a few steps."""

    def __init__(self, env_config=None, extras=None):
        super().__init__()

    def step(self, action):
        reward = sum(map(str.isalpha, action)) / 32
        return BaseTextEnvStepOutput(
            observations=[], reward=reward, done=True, metadata={}
        )


skyrl_gym.register(id="letters", entry_point="skyrl_cpu:Letters")
