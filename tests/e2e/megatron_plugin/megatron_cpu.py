"""What Megatron-Core and its bridge lack to run on CPUs; imported before them.

Kernels for GPUs, which the bridge imports wherever it runs, become empty modules. What
is computed, sharded and exported is Megatron's own.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import torch

# Not installed, and imported at module level.
ABSENT = (
    *("transformer_engine", "triton", "mamba_ssm", "causal_conv1d", "modelopt"),
    *("nvidia_resiliency_ext", "wandb", "tensorboard", "mlflow", "megatron.energon"),
)


class _AnyClass(type):
    """Classes that have any class as an attribute."""

    def __getattr__(cls, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return _AnyClass(name, (torch.nn.Module,), {})


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is absent, with whatever is looked for in it."""

    def find_spec(self, name, path=None, target=None):
        if any(name == root or name.startswith(f"{root}.") for root in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            if spec.name.startswith("triton"):  # decorators of kernels
                return lambda *args, **_: (
                    args[0] if args and callable(args[0]) else lambda kernel: kernel
                )
            return _AnyClass(name, (torch.nn.Module,), {})

        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = attribute
        return module

    def exec_module(self, module):
        """There is nothing in it."""


CPU = torch.device("cpu")
torch.cuda.current_device = lambda: CPU
# These look whether Transformer Engine and Triton are there, and are to find that they
# are not; everything after them just imports names.
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402, F401
import torch._inductor.config  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402

sys.meta_path.insert(0, _Absent())
CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
