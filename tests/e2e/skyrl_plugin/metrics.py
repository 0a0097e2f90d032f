"""Print the metrics that SkyRL gave to TensorBoard, by step, as JSON.

python metrics.py DIRECTORY
"""

from __future__ import annotations

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
steps: dict[int, dict[str, float]] = {}
for name in events.Tags()["scalars"]:
    for event in events.Scalars(name):
        steps.setdefault(event.step, {})[name] = event.value
sys.stdout.write(
    json.dumps([{"step": step, **steps[step]} for step in sorted(steps)]) + "\n"
)
