"""Found by every Python process of the trainer: SkyRL runs on CPUs once it is used.

Nothing is imported before that, so that Ray's own processes start as fast as ever.
"""

from __future__ import annotations

import sys


class _Watch:
    """Looks on as modules are imported, and finds none."""

    def find_spec(self, name, path=None, target=None):
        if name == "skyrl":
            import skyrl_cpu  # noqa: F401
        elif name == "aseer.integrations.skyrl":  # SkyRL itself is imported by then
            from skyrl.train.utils import utils

            # It would start Ray once more, to ask whether GPUs reach each other.
            utils.peer_access_supported = lambda **_: True


sys.meta_path.insert(0, _Watch())
