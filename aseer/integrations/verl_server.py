"""What verl calls a rollout server, in a Ray actor, by the names that verl calls.

Imports nothing of verl or Ray: see `aseer.integrations.actor`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aseer.config import is_speculating
from aseer.errors import ConfigError
from aseer.inputs.fields import refusal
from aseer.inputs.plain import as_list
from aseer.integrations.actor import EngineActor
from aseer.integrations.verl_settings import sampling_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aseer.integrations.verl_settings import ServerSettings
    from aseer.weights.target import WeightTarget

# What verl's generate() is given beside token ids, when there is something of it.
_MEDIA = ("video_data", "audio_data", "mm_processor_kwargs")
# Of a token that is not to be generated.
_NEVER = -1e20
# The level of sleep that does.
_KEEPING_WEIGHTS = 1


class AseerServer(EngineActor):
    """What verl calls a rollout server; all replicas of a trainer share one."""

    _settings: ServerSettings

    def __init__(self, settings: ServerSettings) -> None:
        """Nothing is started yet: see `start`."""
        super().__init__(settings)
        self._global_steps = 0

    async def start(self) -> None:
        """As `EngineActor.start`; on several hosts with a node on each."""
        if self._settings.hosts:
            from aseer.integrations.ray_placed import place_on  # here is Ray

            place_on(self._settings.hosts)
        await super().start()

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str = "",
        priority: int = 0,
        image_data: Sequence[Any] | None = None,
        **media: Any,
    ) -> SimpleNamespace:
        """Sample one response; see verl's `vLLMHttpServer.generate`.

        Args:
            image_data: of a model that sees; the prompt has its image token once an
                image, or as often as the image takes tokens.

        Returns:
            What verl's `TokenOutput` has. `stop_reason` is "aborted" if
            `abort_all_requests` ended it, with the tokens that there were.

        Raises:
            ConfigError: it is no text as token ids, or cannot run.
            AseerError: what ended the rollout.
        """
        for name, value in media.items():
            if value:
                known = "video and audio" if name in _MEDIA else repr(name)
                raise ConfigError(
                    f"generate({name}=...) is not supported: aseer takes texts and "
                    f"images, not {known}"
                )
        prompt = as_list(prompt_ids)
        if prompt is None:
            raise refusal("prompt_ids", prompt_ids, "token ids")
        sampling = sampling_of(self._settings, sampling_params, len(prompt))
        images = list(image_data) if image_data else None
        if images:
            sampling = self._without_image_tokens(sampling)
        size = self._settings.group_size
        response = await self.sample(prompt, sampling, n=size, images=images)
        if response is None:
            return self._output([], [], "aborted")
        reason = "aborted" if response.finish_reason == "aborted" else "completed"
        return self._output(response.token_ids, response.logprobs, reason)

    def _without_image_tokens(self, sampling: dict[str, Any]) -> dict[str, Any]:
        """Sampling with which a model does not generate the token that stands for an
        image: the trainer would take it for one. An engine that speculates cannot.
        """
        engine = self._get()
        tokens = [info.image_token_id for info in engine.instances]
        if sampling.get("logit_bias") or is_speculating(engine.config):
            return sampling
        bias = {token: _NEVER for token in tokens if token >= 0}
        return {**sampling, "logit_bias": bias} if bias else sampling

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

    async def abort_all_requests(
        self, reject_request: bool = False, **_: Any
    ) -> dict[str, Any]:
        """End what runs with the tokens that there are; hold what comes until
        `resume_generation`, or with `reject_request` abort it too.
        """
        aborted = await self.abort(rejects=reject_request)
        return {"aborted_count": aborted, "request_ids": []}

    async def finish_update(self, target: WeightTarget, step: int | None = None) -> int:
        """As `EngineActor.finish_update`; responses carry the step from now on."""
        version = await super().finish_update(target, step)
        if step is not None:
            self._global_steps = int(step)
        return version

    async def set_global_steps(self, global_steps: int) -> None:
        """What responses carry from now on."""
        self._global_steps = int(global_steps)

    async def clear_kv_cache(self) -> None:
        """Nothing is to be done: KV of older weights is never found."""

    async def release_kv_cache(self) -> None:
        """End the rollout; as verl's own, it keeps the weights."""
        await self.sleep(_KEEPING_WEIGHTS)
        await self.wake_up(["weights"])

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
