"""The draft server: the controller's token log, on a thread of its own.

The controller tells the server of every request when it first runs (`follow`), and goes
on at once. The thread takes everything that the server was told before it answers a
client, and reads tokens where the controller keeps them, so an answer is as new as what
the controller knows. If the thread's work fails, the work begins again after a pause.
Meanwhile drafts grow stale, and nothing else happens: what the server is told is kept
up to a bound and dropped beyond that, so that some requests have no text, and groups
expire.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from aseer.dgds.log import TokenLog
from aseer.dgds.messages import (
    TO_SERVER,
    DraftingSpec,
    PackedFetch,
    RegisterGroups,
)
from aseer.transport.threads import lossy_router, run_again

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

    from aseer.config import EngineConfig
    from aseer.core.outputs import Outputs
    from aseer.dgds.messages import ToServer

_log = logging.getLogger("aseer")

_WAKE_INTERVAL_S = 0.05
_EXPIRE_INTERVAL_S = 5.0
# A rollout tells of each request once, of many at its start, and of each group's end.
# As many as a large cluster runs at a time.
MAX_TOLD = 1_000_000


class DraftServer:
    """Serves `TokenLog` at an endpoint between `with` and its end."""

    def __init__(self, spec: DraftingSpec) -> None:
        """Prepare; `spec` is also what the engines' drafters are told."""
        self.spec = spec
        self._token_log = TokenLog()
        self._told: deque[Callable[[], None]] = deque()
        self._weight_version = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="aseer-dgds", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    # Called by the controller; none of these calls waits

    def follow(
        self, group_id: str, request_id: str, outputs: Outputs, handle: int
    ) -> None:
        """Tell of a request, and where what it generates is kept."""
        if len(self._told) >= MAX_TOLD:
            return
        outputs.share(handle)  # at once, as it may be over before it is followed
        now = time.monotonic()
        self._tell(
            lambda: self._token_log.follow(group_id, request_id, outputs, handle, now)
        )

    def update_cst(
        self, group_id: str, request_id: str, prev_token_count: int, new_tokens: bytes
    ) -> None:
        """Tell tokens (int32 as bytes) of a request that is over and not followed."""
        now = time.monotonic()
        self._tell(
            lambda: self._token_log.update_cst(
                group_id, request_id, prev_token_count, new_tokens, now
            )
        )

    def finish_group(self, group_id: str) -> None:
        """Tell that a group needs no more drafts."""
        self._tell(lambda: self._token_log.finish_group(group_id))

    def set_weight_version(self, weight_version: int) -> None:
        """Tell the version of the weights that generate from now on.

        Texts of other weights are dropped, unless the settings keep them.
        """
        drops = self.spec.settings.after_weight_update == "drop"
        if drops and weight_version != self._weight_version:
            # Queued behind what was told before, and never dropped for lack of room:
            # there is only one for each update of the weights.
            self._told.append(self._token_log.forget_kept)
        self._weight_version = weight_version

    def ask(self, message: ToServer, take: Callable[[bytes], None]) -> None:
        """Answer a client that has no way to the endpoint; like it, may be dropped.

        Args:
            take: called with the answer, packed, if there is one, on the server's
                thread.
        """

        def answer() -> None:
            said = self._answer(message, time.monotonic())
            if said is not None:
                take(said)

        self._tell(answer)

    def _tell(self, what: Callable[[], None]) -> None:
        if len(self._told) < MAX_TOLD:
            self._told.append(what)

    # On the server's thread

    def _run(self) -> None:
        run_again(self._serve, self._stop, "the draft server", "drafts are stale")

    def _serve(self) -> None:
        next_expiry = 0.0
        with lossy_router(self.spec.endpoint, TO_SERVER) as socket:
            while not self._stop.is_set():
                received = socket.receive(_WAKE_INTERVAL_S)
                self._take_what_was_told()
                now = time.monotonic()
                if received is not None:
                    peer, message = received
                    answer = self._answer(message, now)
                    if answer is not None:
                        socket.send(answer, peer)
                if now >= next_expiry:
                    self._token_log.expire(now)
                    next_expiry = now + _EXPIRE_INTERVAL_S

    def _take_what_was_told(self) -> None:
        for _ in range(len(self._told)):
            self._told.popleft()()

    def _answer(self, message: ToServer, now: float) -> bytes | None:
        match message:
            case RegisterGroups(groups):
                for entry in groups:
                    self._token_log.register_group(
                        entry.group_id, entry.prompt_key, entry.ttl_s, now
                    )
                return None
            case PackedFetch(cache_infos):
                try:
                    return self._token_log.fetch_cst(bytes(cache_infos), now)
                except ValueError as error:
                    _log.warning("dropped a question of a draft client: %s", error)
                    return None


def make_draft_server(config: EngineConfig, run_dir: Path) -> DraftServer | None:
    """The server that an engine needs; None if it does not draft by group."""
    settings = config.speculation
    if settings.method != "dgds":
        return None
    return DraftServer(
        DraftingSpec(
            settings=settings,
            endpoint=f"ipc://{run_dir}/dgds",
            fetch_interval_s=config.report_interval_s,
        )
    )
