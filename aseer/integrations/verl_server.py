"""The engine behind verl's trainer, in a Ray actor: requests, weights, sleep.

Imports nothing of verl or Ray, so that the actor starts fast, and tests need neither.
verl's agent loops ask for one response at a time. All that come between two weight
updates are one rollout, through a desk that joins the siblings of a prompt into groups.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aseer.config import EngineConfig
from aseer.errors import ConfigError, RolloutClosedError, RolloutError
from aseer.integrations.verl_settings import sampling_of
from aseer.node.janitor import start_janitor
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aseer.integrations.verl_settings import ServerSettings
    from aseer.runtime.desk import Desk
    from aseer.types import Response
    from aseer.weights.target import WeightTarget

_log = logging.getLogger("aseer.verl")
# Sleep of this level drops the weights: verl sends new ones before every rollout.
_SLEEP_LEVEL = 2
# What verl's generate() is given beside token ids, when there is something of it.
_MEDIA = ("image_data", "video_data", "audio_data", "mm_processor_kwargs")


class AseerServer:
    """What verl calls a rollout server; all replicas of a trainer share one."""

    def __init__(self, settings: ServerSettings) -> None:
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
        self._rejects = False
        self._global_steps = 0

    async def start(self) -> None:
        """Bring the engine up, once; every replica asks for it.

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
            await self._close_desk()
            await self._engine.aclose()
            self._engine = None

    # Requests

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str = "",
        priority: int = 0,
        **media: Any,
    ) -> SimpleNamespace:
        """Sample one response; see verl's `vLLMHttpServer.generate`.

        Returns:
            What verl's `TokenOutput` has. `stop_reason` is "aborted" if
            `abort_all_requests` ended it, with the tokens that there were.

        Raises:
            ConfigError: it is not a text, or cannot run.
            AseerError: what ended the rollout.
        """
        for name, value in media.items():
            if value:
                known = "images, video and audio" if name in _MEDIA else repr(name)
                raise ConfigError(
                    f"generate({name}=...) is not supported: aseer samples texts, and "
                    f"does not take {known}"
                )
        prompt = [int(token) for token in prompt_ids]
        sampling = sampling_of(self._settings, sampling_params, len(prompt))
        while not self._is_admitting.is_set():
            if self._rejects:
                return self._output([], [], "aborted")
            await self._is_admitting.wait()
        with self._running():
            try:
                response = await self._submit(prompt, sampling)
            except RolloutClosedError:
                if self._is_admitting.is_set():
                    raise
                return self._output([], [], "aborted")
        if response.finish_reason == "error":
            raise RolloutError(f"a request of verl's failed: {response.error}")
        reason = "aborted" if response.finish_reason == "aborted" else "completed"
        return self._output(response.token_ids, response.logprobs, reason)

    async def _submit(self, prompt: list[int], sampling: dict[str, Any]) -> Response:
        desk = await self._open_desk()
        return await desk.submit(prompt, sampling, n=self._settings.group_size)

    def _output(
        self, token_ids: Sequence[int], logprobs: Sequence[float], stop_reason: str
    ) -> SimpleNamespace:
        steps = self._global_steps
        return SimpleNamespace(
            token_ids=list(token_ids),
            log_probs=[float(each) for each in logprobs],
            routed_experts=None,
            stop_reason=stop_reason,
            num_preempted=0,
            extra_fields={
                "global_steps": steps,
                "min_global_steps": steps,
                "max_global_steps": steps,
            },
        )

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

    async def abort_all_requests(
        self, reject_request: bool = False, **_: Any
    ) -> dict[str, Any]:
        """End what runs with the tokens that there are; hold what comes until
        `resume_generation`, or with `reject_request` abort it too.
        """
        self._rejects = reject_request
        self._is_admitting.clear()
        aborted = self._num_running
        await self._get().abort_rollout()
        await self._close_desk()
        await self._nothing_runs.wait()
        return {"aborted_count": aborted, "request_ids": []}

    async def resume_generation(self) -> None:
        """Take requests again."""
        self._rejects = False
        self._is_admitting.set()

    # Weights

    async def begin_update(self) -> WeightTarget:
        """A target for the process of the trainer that sends; see `WeightTarget`."""
        await self._drain()
        timeout_s = self._settings.update_timeout_s
        return await self._get().begin_update(timeout_s=timeout_s)

    async def finish_update(
        self, target: WeightTarget, global_steps: int | None
    ) -> int:
        """Switch to what was sent; the engine's weight version from now on.

        Raises:
            WeightUpdateError: the old weights stay.
        """
        report = await self._get().finish_update(target)
        if global_steps is not None:
            self._global_steps = int(global_steps)
        _log.info(
            "weights of step %s are version %d: %d tensors, %.3f GB, sent in %.2f s, "
            "switched in %.2f s",
            global_steps,
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

    async def set_global_steps(self, global_steps: int) -> None:
        """What responses carry from now on."""
        self._global_steps = int(global_steps)

    # Memory

    async def sleep(self) -> None:
        """End the rollout when its requests are over, and release the GPUs."""
        await self._drain()
        if self._settings.sleeps:
            await self._get().sleep(_SLEEP_LEVEL)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the GPUs' memory back: all, or the weights' or the KV cache's."""
        if self._settings.sleeps:
            await self._get().wake(tags)

    async def clear_kv_cache(self) -> None:
        """Nothing is to be done: KV of older weights is never found."""

    async def release_kv_cache(self) -> None:
        """End the rollout; as verl's own, it keeps the weights."""
        await self._drain()
        if self._settings.sleeps:
            await self._get().sleep(_SLEEP_LEVEL)
            await self._get().wake(["weights"])

    async def resume_kv_cache(self) -> None:
        """The counterpart of `release_kv_cache`."""
        await self.wake_up(["kv_cache"])

    async def wait_for_requests_to_drain(self) -> None:
        """Return when nothing runs."""
        await self._nothing_runs.wait()

    async def start_profile(self, **_: Any) -> None:
        """Not supported; verl asks for it where nothing is profiled, too."""

    async def stop_profile(self) -> None:
        """As `start_profile`."""

    # The rollout

    def _get(self) -> Engine:
        if self._engine is None:
            raise ConfigError("the server is not started")
        return self._engine

    async def _open_desk(self) -> Desk:
        async with self._changing_desk:
            if self._desk is None:
                desk = self._get().open_rollout(join_s=self._settings.join_s)
                await desk.__aenter__()
                self._desk = desk
            return self._desk

    async def _drain(self) -> None:
        await self._nothing_runs.wait()
        await self._close_desk()

    async def _close_desk(self) -> None:
        async with self._changing_desk:
            desk, self._desk = self._desk, None
            if desk is None:
                return
            await desk.aclose()
        report = desk.report
        _log.info(
            "a rollout of %d responses in %d groups, %d tokens in %.1f s (%.0f "
            "tokens/s), with weights of version %d",
            report.num_responses,
            report.num_groups,
            report.num_output_tokens,
            report.wall_s,
            report.throughput_tok_s,
            report.weight_version,
        )
