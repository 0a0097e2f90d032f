"""`gang_trainer.py`, with engines that share out experts on CPUs."""

from __future__ import annotations

import json
import sys

from aseer.runtime import launch
from tests.e2e import gang_trainer

if __name__ == "__main__":
    launch.check_experts = lambda _: None  # see expert_parallel.py
    gang_trainer.main(json.loads(sys.argv[1]))
