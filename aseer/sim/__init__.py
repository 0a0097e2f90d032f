"""A simulated cluster around the same decisions that real engines get.

`simulate` runs a `Workload` on a `Cluster` under the buffer, context manager and
scheduler of real rollouts, on a virtual clock, and returns a `RolloutReport`.
"""

from aseer.sim.cluster import Cluster, simulate
from aseer.sim.hardware import GPUS, MODELS, Gpu, ModelShape, Roofline
from aseer.sim.workload import Workload

__all__ = [
    "GPUS",
    "MODELS",
    "Cluster",
    "Gpu",
    "ModelShape",
    "Roofline",
    "Workload",
    "simulate",
]
