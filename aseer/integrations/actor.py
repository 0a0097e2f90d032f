"""The engine behind a trainer that runs on Ray, in an actor: requests, weights, sleep.

Imports nothing of Ray or of a trainer, so that the actor starts fast, and tests need
neither. Trainers of this kind ask for one response at a time. All that come between two
weight updates are one rollout, through a desk that joins the siblings of a prompt into
groups.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aseer.config import EngineConfig
from aseer.errors import AseerError, ConfigError, RolloutClosedError, RolloutError
from aseer.node.janitor import start_janitor
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aseer.integrations.settings import ActorSettings
    from aseer.runtime.desk import Desk
    from aseer.types import Response
    from aseer.weights.target import WeightTarget

_log = logging.getLogger("aseer.actor")
# Sleep of this level drops the weights: trainers send new ones before every rollout.
_SLEEP_LEVEL = 2


class EngineActor:
    """An engine, for the processes of one trainer."""

    def __init__(self, settings: ActorSettings) -> None:
        """Nothing is started yet: see `start`."""
        self._settings = settings
        self._engine: Engine | None = None
        self._starting = asyncio.Lock()
        self._desk: Desk | None = None
        self._changing_desk = asyncio.Lock()
        self._num_running = 0
        self._nothing_runs = asyncio.Event()
        self._nothing_runs.set()
        self._is_admitting = asyncio.Event()
        self._is_admitting.set()
        self._num_beginning = 0  # updates that wait for what runs
        self._none_begins = asyncio.Event()
        self._none_begins.set()
        self._rejects = False

    async def start(self) -> None:
        """Bring the engine up, once, however often it is asked for.

        Raises:
            AseerError: it cannot start.
        """
        async with self._starting:
            if self._engine is None:
                logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
                engine = Engine(EngineConfig(**self._settings.engine))
                await engine.__aenter__()
                self._engine = engine
                # Ray kills actors at a job's end, with all their children.
                await asyncio.to_thread(start_janitor, engine.run_dir)
                _log.info(
                    "%d instances are up; process %d, files in %s",
                    len(engine.instances),
                    os.getpid(),
                    engine.run_dir,
                )

    async def stop(self) -> None:
        """End the engine with all its processes."""
        if self._engine is not None:
            try:
                await self._close_desk()
            finally:
                await self._engine.aclose()
                self._engine = None

    # Requests

    async def sample(
        self,
        prompt: Sequence[int],
        sampling: Mapping[str, Any],
        *,
        n: int,
        images: Sequence[Any] | None = None,
    ) -> Response | None:
        """Sample one response; while requests are held, or an update begins, wait.

        Args:
            n: the most siblings that the request can have, itself included.
            images: see `aseer.Group`.
        Returns:
            The response; None if it was aborted before it began.

        Raises:
            ConfigError: it cannot run.
            AseerError: what ended the rollout.
        """
        while not (self._is_admitting.is_set() and self._none_begins.is_set()):
            if not self._is_admitting.is_set() and self._rejects:
                return None
            await self._is_admitting.wait()
            await self._none_begins.wait()
        with self._running():
            try:
                desk = await self._open_desk()
                response = await desk.submit(list(prompt), sampling, n=n, images=images)
            except RolloutClosedError:
                if self._is_admitting.is_set():
                    raise
                return None
        if response.finish_reason == "error":
            raise RolloutError(f"a request of the trainer's failed: {response.error}")
        return response

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._num_running += 1
        self._nothing_runs.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._nothing_runs.set()

    async def hold(self) -> None:
        """Begin no more requests, and return once those that run are over."""
        self._is_admitting.clear()
        await self._nothing_runs.wait()  # none begins meanwhile

    async def abort(self, *, rejects: bool) -> int:
        """End what runs with the tokens that there are; their number.

        Args:
            rejects: whether requests that come later are aborted too, not held.
        """
        self._rejects = rejects
        self._is_admitting.clear()
        aborted = self._num_running
        await self._get().abort_rollout()
        await self._close_desk()
        await self._nothing_runs.wait()
        return aborted

    async def resume_generation(self) -> None:
        """Take requests again."""
        self._rejects = False
        self._is_admitting.set()

    # Weights

    async def begin_update(self) -> WeightTarget:
        """A target for the process of the trainer that sends; see `WeightTarget`.

        What runs is waited for; requests that come meanwhile are of the new weights.
        """
        self._num_beginning += 1
        self._none_begins.clear()
        try:
            await self._drain()
            timeout_s = self._settings.update_timeout_s
            return await self._get().begin_update(timeout_s=timeout_s)
        finally:
            self._num_beginning -= 1
            if not self._num_beginning:
                self._none_begins.set()

    async def finish_update(self, target: WeightTarget, step: int | None = None) -> int:
        """Switch to what was sent; the engine's weight version from now on.

        Args:
            step: the trainer's own number of these weights, for the log.
        Raises:
            WeightUpdateError: the old weights stay.
        """
        report = await self._get().finish_update(target)
        _log.info(
            "weights%s are version %d: %d tensors, %.3f GB, sent in %.2f s, "
            "switched in %.2f s",
            "" if step is None else f" of step {step}",
            report.version,
            report.num_tensors,
            report.num_bytes / 1e9,
            report.send_s,
            report.prepare_s + report.switch_s,
        )
        return report.version

    async def abandon_update(self, target: WeightTarget) -> None:
        """Keep the weights that there are."""
        await self._get().abandon_update(target)

    # Memory

    async def sleep(self, level: int = _SLEEP_LEVEL) -> None:
        """End the rollout when its requests are over, and release the GPUs.

        Args:
            level: see `Engine.sleep`.
        """
        await self._drain()
        if self._settings.sleeps:
            await self._get().sleep(level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the GPUs' memory back: all, or the weights' or the KV cache's."""
        if self._settings.sleeps:
            await self._get().wake(tags)

    # The rollout

    def _get(self) -> Engine:
        if self._engine is None:
            raise ConfigError("the server is not started")
        return self._engine

    async def _open_desk(self) -> Desk:
        async with self._changing_desk:
            # One whose rollout has failed serves no later request. While requests are
            # held, it was ended for those that run, which are told so by it.
            if self._desk and self._desk.has_ended and self._is_admitting.is_set():
                await self._end_desk()
            if self._desk is None:
                desk = self._get().open_rollout(join_s=self._settings.join_s)
                await desk.__aenter__()
                self._desk = desk
            return self._desk

    async def _drain(self) -> None:
        while self._num_running:  # one may have begun since the last was over
            await self._nothing_runs.wait()
        await self._close_desk()

    async def _close_desk(self) -> None:
        async with self._changing_desk:
            await self._end_desk()

    async def _end_desk(self) -> None:
        desk, self._desk = self._desk, None
        if desk is None:
            return
        await desk.aclose()
        try:
            report = desk.report
        except AseerError:  # those who asked for its responses were told why
            _log.warning("a rollout failed, and has no report")
            return
        _log.info(
            "a rollout of %d responses in %d groups on %d instances, %d tokens in "
            "%.1f s (%.0f tokens/s), with weights of version %d",
            report.num_responses,
            report.num_groups,
            sum(each.num_output_tokens > 0 for each in report.instances),
            report.num_output_tokens,
            report.wall_s,
            report.throughput_tok_s,
            report.weight_version,
        )
