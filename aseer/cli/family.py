"""What aseer does for a model's family, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.kv.pool import model_obstacle

if TYPE_CHECKING:
    from aseer.models.traits import ModelTraits


def family_notes(traits: ModelTraits, *, on_cpu: bool) -> tuple[str, str]:
    """What there is to know of a model, and what to expect if that is less; or ""."""
    said = [traits.words]
    if len(traits.kinds) > 1:
        said.append(
            "KV is reserved for each kind of layer, and chunks end where the blocks of "
            "all do (`Engine.instances` tells their sizes)"
        )
    if "state" in traits.kinds:
        said.append("each drafted token takes a state's KV blocks")
    if on_cpu and traits.rotates_slices:
        said.append(
            "its rotations are computed by torch, since vLLM's kernel for CPUs gets "
            "those of slices wrong"
        )
    obstacle = model_obstacle(traits)
    if obstacle is None:
        return "; ".join([*said, "its KV can be in a pool"]), ""
    return (
        "; ".join(said),
        f"no KV pool: {obstacle}. Chunks that move compute their prefix again",
    )
