"""A user's extension is in the workers, and aseer's own still works there."""

from __future__ import annotations

import aseer
from tests.e2e.extension import SAYS
from tests.e2e.tiny import tiny_config, tiny_model


def test_a_users_extension_replaces_nothing_of_ours():
    args = {"worker_extension_cls": "tests.e2e.extension.Extension"}
    config = tiny_config(num_instances=1, engine_args=args, speculation="dgds")
    group = aseer.Group([5, 6, 7], n=2, sampling={"max_tokens": 8})
    with aseer.Engine(config) as engine:
        engine.update_weights_sync(tiny_model())  # by a call that ours has
        assert len(list(engine.rollout_sync([group]))) == 2
        assert f"{SAYS} WorkerExtensionWithExtension" in engine.log_paths[0].read_text()
