"""Lets Ray start on a machine that is busy: it gives up after 30 s otherwise.

Where it is so busy that Ray's own processes end for lack of time, this does not help.
"""

from __future__ import annotations

import time

from ray._private import services

TIMEOUT_S = 120.0
_get_node = services.get_node


def get_node(*args, **kwargs):
    """As Ray's own, which Ray asks until its node has registered."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return _get_node(*args, **kwargs)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


services.get_node = get_node
