"""Found by every Python process of the trainer: SkyRL runs on CPUs once it is used.

Nothing is imported before that, so that Ray's own processes start as fast as ever.
"""

from __future__ import annotations

import sys


def _let_the_end_come_first():
    """Ask for no token at least, where SkyRL asks for one.

    Without the end token the first one's distribution is not the one that the trainer
    computes, and the test compares the two to rounding.
    """
    from skyrl.backends.skyrl_train.inference_servers import engine_utils

    made = engine_utils.get_vllm_sampling_params
    engine_utils.get_vllm_sampling_params = lambda given: (
        made(given) | {"min_tokens": 0}
    )


class _Watch:
    """Looks on as modules are imported, and finds none."""

    def find_spec(self, name, path=None, target=None):
        if name == "skyrl":
            import skyrl_cpu  # noqa: F401
        elif name == "aseer.integrations.skyrl_policy":
            # SkyRL itself is imported by then.
            from skyrl.train.utils import utils

            # It would start Ray once more, to ask whether GPUs reach each other.
            utils.peer_access_supported = lambda **_: True
            _let_the_end_come_first()


sys.meta_path.insert(0, _Watch())
