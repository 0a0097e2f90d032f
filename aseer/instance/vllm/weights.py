"""The weights of a vLLM engine: what they are, and how it gets others.

Whole weights go to the workers, each of which opens the files and takes its own part.
Adapters go to vLLM as its own LoRA does: loaded beside those that serve, and named by
every request from the switch on.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from aseer.errors import EngineError, describe
from aseer.instance.base import EngineDied
from aseer.instance.vllm.caches import empty_caches
from aseer.weights.files import Index, describe_checkpoint, dtype_name, read_index
from aseer.weights.lora import FILE, module_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm.v1.engine.async_llm import AsyncLLM

    from aseer.weights.checks import ModelSpec

_CONFIG = "adapter_config.json"
_LOSES_WEIGHTS = frozenset({"GptOssForCausalLM"})


class EngineWeights:
    """Of one engine.

    Attributes:
        lora: the adapters that requests are to name; None = there are none.
    """

    def __init__(self, engine: Callable[[], AsyncLLM]) -> None:
        """`engine` is asked for when weights are."""
        self._engine = engine
        self.lora: LoRARequest | None = None
        self._prepared: LoRARequest | None = None
        self._num_adapters = 0

    async def describe(self) -> ModelSpec:
        """See `Backend.describe_weights`."""
        config = self._engine().vllm_config
        model, lora = config.model_config, config.lora_config
        settings = (model.hf_config, model.hf_text_config)
        # vLLM no longer trusts the settings of a checkpoint that has both tensors.
        declares_tied = getattr(model, "word_embeddings_untied_by_checkpoint", False)
        declares_tied |= any(getattr(s, "tie_word_embeddings", False) for s in settings)
        return await asyncio.to_thread(
            describe_checkpoint,
            model.model,
            model.revision,
            dtype_name(model.dtype),
            declares_tied=declares_tied,
            num_layers=getattr(model.hf_text_config, "num_hidden_layers", None),
            max_lora_rank=lora.max_lora_rank if lora else 0,
        )

    async def prepare(self, index: str, *others: str) -> None:
        """See `Backend.prepare_weights`."""
        await self.discard()
        found = read_index(index)
        if not found.lora_rank:
            refuse_lost_weights(self._engine().vllm_config)
            await call_workers(self._engine(), "aseer_prepare_weights", index, *others)
            return
        # Workers on other nodes do not find the directory that is made here.
        assert not others, "EngineConfig refuses adapters for engines that span nodes"
        self._num_adapters += 1
        name = f"policy-{self._num_adapters}"
        directory = await asyncio.to_thread(_peft_directory, found, Path(index).parent)
        request = LoRARequest(name, self._num_adapters, str(directory))
        with _alive():
            await self._engine().add_lora(request)
        self._prepared = request

    async def commit(self) -> None:
        """See `Backend.commit_weights`."""
        if self._prepared is None:
            await call_workers(self._engine(), "aseer_commit_weights")
        with _alive():
            await self._take_away(self.lora)
            self.lora, self._prepared = self._prepared, None
            await empty_caches(self._engine())

    async def drop_adapters(self) -> None:
        """Whole weights came another way; adapters stood on those before."""
        with _alive():
            await self._take_away(self.lora)
        self.lora = None

    async def discard(self) -> None:
        """See `Backend.discard_weights`."""
        await call_workers(self._engine(), "aseer_discard_weights")
        with _alive():
            await self._take_away(self._prepared)
        self._prepared = None

    async def _take_away(self, lora: LoRARequest | None) -> None:
        if lora is not None:
            await self._engine().remove_lora(lora.lora_int_id)


def refuse_lost_weights(config: Any) -> None:
    """Refuse new weights that vLLM would lose without an error.

    vLLM's gpt-oss copies experts' weights straight into their parameters, which have no
    values during a reload. The old ones are put back, and on a CPU packed once more.

    Raises:
        EngineError: the model is such a one.
    """
    lost = _LOSES_WEIGHTS & set(config.model_config.hf_config.architectures or ())
    if lost:
        raise EngineError(
            f"vLLM's reload keeps the experts of {', '.join(lost)} as they were: save "
            "the new weights as a checkpoint, and start another Engine with that"
        )


async def call_workers(engine: AsyncLLM, method: str, *args: Any) -> None:
    """Call a method of aseer's extension in every worker.

    Raises:
        EngineDied: the engine cannot go on.
    """
    with _alive():
        await engine.collective_rpc(method, args=args)


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except EngineDeadError as error:
        raise EngineDied(describe(error)) from error


def _peft_directory(index: Index, beside: Path) -> Path:
    """A directory in PEFT's form, which goes with the update's own."""
    directory = Path(tempfile.mkdtemp(prefix="peft-", dir=beside))
    (directory / FILE).symlink_to(index.files[0])
    layers = {module_of(tensor.name).rpartition(".")[2] for tensor in index.tensors}
    settings = {
        "peft_type": "LORA",
        "r": index.lora_rank,
        "lora_alpha": index.lora_rank,  # scales are in the factors
        "target_modules": sorted(layers),
    }
    (directory / _CONFIG).write_text(json.dumps(settings))
    return directory
