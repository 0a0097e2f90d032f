"""The doctor's checks of a model: what is done for its family, and what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aseer.cli.findings import Check, Finding, fail, ok, warn
from aseer.cli.fit import check_room
from aseer.cli.probes import ARCHITECTURES, PROCESSOR, ProbeError, probe
from aseer.compat.versions import installed_vllm, is_cpu_build
from aseer.errors import ConfigError
from aseer.kv.pool import model_obstacle
from aseer.models.traits import read_settings, text_settings, traits_of

if TYPE_CHECKING:
    from collections.abc import Mapping

# What transformers calls the families of which tests run a tiny model on an engine.
TESTED = frozenset(
    {
        "deepseek_v3",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "granitemoehybrid",
        "llama",
        "mistral",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl",
    }
)
_ON_CPU: Mapping[str, str] = {
    "lfm2": "on a CPU vLLM's tokens of this family depend on the other requests of a "
    "batch",
    "mamba2": "vLLM cannot run this family on a CPU: it fails on a batch of several "
    "prompts",
    "qwen3_next": 'set dtype="bfloat16": on a CPU vLLM computes its linear attention '
    "in nothing else",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def model_checks(model: str) -> list[Check]:
    """What is to be known of a model before an engine is started."""

    def settings() -> dict[str, Any] | None:
        return read_settings(model)

    return [
        Check(name="model", run=lambda: check_model(model)),
        Check(
            name="architecture",
            run=lambda: check_architecture(settings()),
            needs=("vllm", "model"),
        ),
        Check(
            name="images",
            run=lambda: check_images(model, settings()),
            needs=("transformers", "model"),
        ),
        Check(name="room", run=lambda: check_room(model), needs=("model",)),
    ]


def check_model(model: str) -> Finding:
    """What is done for a model's family."""
    try:
        settings = read_settings(model)
    except ConfigError as error:
        what, _, advice = str(error).partition("; ")
        return fail(what, advice)
    if settings is None:
        return fail(
            f"{model} has no config.json that can be read",
            "give a model's directory, or the name of one that was downloaded",
        )
    found = installed_vllm()
    on_cpu = found is not None and is_cpu_build(*found)
    detail, advice = family_notes(settings, on_cpu=on_cpu)
    return warn(detail, advice) if advice else ok(detail)


def family_notes(settings: Mapping[str, Any], *, on_cpu: bool) -> tuple[str, str]:
    """What there is to know of a model, and what to expect if that is less; or "".

    Args:
        settings: of its `config.json`.
    """
    traits = traits_of(settings)
    said, costs = [traits.words], []
    if settings.get("model_type") not in TESTED:
        said.append("aseer has no test with this family")
    if len(traits.kinds) > 1:
        said.append(
            "KV is reserved for each kind of layer, and chunks end where the blocks of "
            "all do (`Engine.instances` tells their sizes)"
        )
    if "state" in traits.kinds:
        said.append("each drafted token takes a state's KV blocks")
    if any((text_settings(settings).get(name) or 0) > 1 for name in _EXPERTS):
        said.append(
            "its experts can be spread over an engine's GPUs (`gpus_per_instance`, and "
            "`enable_expert_parallel` in `engine_args`)"
        )
    if on_cpu and traits.rotates_slices:
        said.append(
            "its rotations are computed by torch, since vLLM's kernel for CPUs gets "
            "those of slices wrong"
        )
    if on_cpu and traits.has_latent:
        said.append(
            "without AMX vLLM keeps none of its KV for a resumed chunk, which then "
            "loads it from the pool"
        )
    if model_obstacle(traits) is None:
        said.append("its KV can be in a pool")
    else:
        costs.append(
            "no KV pool, since LMCache serves models of full attention alone: chunks "
            "that move compute their prefix again"
        )
    if on_cpu and traits.model_type in _ON_CPU:
        costs.append(_ON_CPU[traits.model_type])
    return "; ".join(said), "; ".join(costs)


def check_architecture(settings: Mapping[str, Any] | None) -> Finding:
    """Whether vLLM has the model's class."""
    named = list((settings or {}).get("architectures") or [])
    if not named:
        return warn(
            "its config.json names none",
            "vLLM needs it: set `architectures` there, as transformers writes it",
        )
    try:
        known = probe(ARCHITECTURES)["names"]
    except ProbeError as error:
        return fail(str(error), "see what `python -c 'import vllm'` says")
    if set(named) & set(known):
        return ok(", ".join(named))
    return warn(
        f"vLLM has no class for {', '.join(named)}",
        "engines may run it by transformers' own code, slower, or not at all: try a "
        "newer vLLM",
    )


def check_images(model: str, settings: Mapping[str, Any] | None) -> Finding:
    """Whether prompts with images can be given to the model from here."""
    if "vision_config" not in (settings or {}):
        return ok("the model takes none")
    try:
        found = probe(PROCESSOR, model)
    except ProbeError as error:
        return warn(
            f"its processor cannot count an image's tokens here: {error}",
            "texts work without; most processors need torchvision, of torch's build",
        )
    return ok(f"224 x 224 pixels take {found['num_tokens']} tokens")
