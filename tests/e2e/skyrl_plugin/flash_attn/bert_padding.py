"""Names that SkyRL imports, and does not call with `trainer.flash_attn=false`."""

from __future__ import annotations


def _absent(*_, **__):
    raise RuntimeError("flash-attn is not installed here")


pad_input = unpad_input = index_first_axis = rearrange = _absent
