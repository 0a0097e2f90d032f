"""What names mean: wrappers taken off, and which tensor is the output layer's, too.

Pure. Trainers' names differ from a checkpoint's by what their wrappers put in
(`module.` of DDP, `_orig_mod.` of torch.compile), by what transformers calls the parts
of a model that sees, and by whether a weight that the embedding and the output layer
share has one name or two.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

# Parts that wrappers put anywhere in a name, and that no checkpoint has.
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
# DDP's. A model's own module may be called so, too.
_MAYBE_WRAPPER = "module"
# transformers' names of modules that older checkpoints call otherwise (Mixtral).
_EXPERTS = {"mlp": "block_sparse_moe"}
# What it calls the parts of models that see, and what older checkpoints call them. It
# has the one in memory and writes the other; engines read both.
_PARTS = (
    ("model.visual.", "visual."),  # Qwen2-VL, Qwen2.5-VL
    ("model.language_model.", "model."),
    ("model.language_model.", "language_model.model."),  # Gemma 3, LLaVA
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
# What it calls the router and the experts of Granite, and what checkpoints call them.
_ENDS = (
    (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
    (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
    (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
)
_EMBEDDINGS = frozenset(
    {
        "embed_tokens",  # Llama, Qwen, Gemma and most others
        "embed_in",  # GPT-NeoX
        "embeddings",  # Mamba
        "tok_embeddings",  # InternLM2
        "word_embeddings",  # Falcon, Bloom
        "wte",  # GPT-2
    }
)
_OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", "output_layer", "output"})
# Of multi-token prediction, where it has a name of its own. Else (DeepSeek-V3, GLM-4.5)
# its layers follow a language model's last.
_FURTHER = re.compile(r"mtp(_.*)?")
_LAYER = re.compile(
    r"(?:model|model\.language_model|language_model\.model|language_model)"
    r"\.layers\.(\d+)\."
)
# Computed at the start by models that still save them; engines skip them.
_NOT_WEIGHTS = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


def unwrapped(name: str, known: Container[str]) -> str:
    """The name among the `known` ones that this is with its wrappers taken off.

    A part of a model that sees may be called as in memory or as in a checkpoint. Of a
    name that is not known in any form, what surely is a wrapper's is taken off.
    """
    if name in known:
        return name
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    forms = list(_forms(parts))
    forms += [renamed for form in forms for renamed in _with_other_parts(form)]
    return next((form for form in forms if form in known), ".".join(parts))


def _forms(parts: list[str]) -> Iterator[str]:
    spellings = [parts, [_EXPERTS.get(part, part) for part in parts]]
    for spelt in spellings:
        yield ".".join(spelt)
        own = spelt
        while own and own[0] == _MAYBE_WRAPPER:
            own = own[1:]
            yield ".".join(own)
        yield ".".join(part for part in own if part != _MAYBE_WRAPPER)


def _with_other_parts(name: str) -> Iterator[str]:
    for pair in _PARTS:
        for prefix, other in (pair, pair[::-1]):
            if name.startswith(prefix):
                yield other + name.removeprefix(prefix)
    for end, other in _ENDS:
        if name.endswith(end):
            yield name.removesuffix(end) + other


def is_weight(name: str) -> bool:
    """Whether engines load it."""
    return not name.endswith(_NOT_WEIGHTS)


def predicts_further(name: str, num_layers: int | None) -> bool:
    """Whether it is of layers that predict more than the next token.

    Checkpoints have them for speculation; what samples, and trainers, do without.

    Args:
        num_layers: of the model without them; None = not known.
    """
    if any(_FURTHER.fullmatch(part) for part in name.split(".")):
        return True
    layer = _LAYER.match(name)
    return layer is not None and num_layers is not None and int(layer[1]) >= num_layers


def is_output_layer(name: str) -> bool:
    """Whether it is, by its name, the weight of a language model's output layer."""
    return _layer_of(name) in _OUTPUT_LAYERS


def embedding_of(names: Iterable[str]) -> str | None:
    """The one weight of an input embedding among these; None if it is not one."""
    found = [name for name in names if _layer_of(name) in _EMBEDDINGS]
    return found[0] if len(found) == 1 else None


def _layer_of(name: str) -> str:
    layer, _, what = name.rpartition(".")
    return layer.rpartition(".")[2] if what == "weight" else ""
