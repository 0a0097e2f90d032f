"""The draft client: keeps an engine's replica fresh from a thread of its own.

The client lives in the vLLM worker's process, beside the token path: it asks the server
a few times a second, and grows the replica's trees between the token path's calls. A
dead or slow server leaves the trees as they are.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from aseer.dgds.messages import TO_CLIENT
from aseer.transport.threads import lossy_dealer, run_again

if TYPE_CHECKING:
    from aseer.dgds.messages import ToClient
    from aseer.dgds.replica import Replica
    from aseer.transport.threads import LossySocket

_ANSWER_TIMEOUT_S = 1.0


class DraftClient:
    """Fetches what siblings wrote on other engines; its thread starts at once."""

    def __init__(
        self, replica: Replica, endpoint: str, identity: bytes, fetch_interval_s: float
    ) -> None:
        self._replica = replica
        self._endpoint = endpoint
        self._identity = identity
        self._interval_s = fetch_interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="aseer-dgds", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        run_again(self._fetch_all, self._stop, "the draft client", "drafts are stale")

    def _fetch_all(self) -> None:
        with lossy_dealer(self._endpoint, self._identity, TO_CLIENT) as socket:
            while not self._stop.wait(self._interval_s):
                self._exchange(socket)
                # Done whether or not a server answers: otherwise trees are kept for
                # ever.
                self._replica.forget_unused(time.monotonic())

    def _exchange(self, socket: LossySocket[ToClient]) -> None:
        """Ask once, and take all answers that have arrived, late ones included."""
        question = self._replica.fetch()
        if question is None:
            return
        registration = self._replica.registration()
        if registration is not None:
            socket.send(registration)
        socket.send(question)
        timeout_s = _ANSWER_TIMEOUT_S
        while (answer := socket.receive(timeout_s)) is not None:
            self._replica.apply(answer[1])
            timeout_s = 0.0
