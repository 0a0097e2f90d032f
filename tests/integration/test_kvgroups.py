"""What vLLM's plan of a model's KV says of a request's blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aseer.instance.vllm.kvgroups import describe_groups
from aseer.types import KvGroup

kv = pytest.importorskip("vllm.v1.kv_cache_interface")
torch = pytest.importorskip("torch")

HEADS = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
FULL = kv.FullAttentionSpec(block_size=32, **HEADS)
WINDOW = kv.SlidingWindowSpec(block_size=32, sliding_window=64, **HEADS)


def state(mode: str, **settings: Any) -> Any:
    return kv.MambaSpec(
        block_size=160,
        shapes=((4, 4),),
        dtypes=(torch.float32,),
        mamba_cache_mode=mode,
        **settings,
    )


def described(*specs: Any, **settings: int) -> tuple[list[KvGroup], int]:
    defaults: dict[str, Any] = {"batched_tokens": 256, "step_tokens": 1, "num_steps": 1}
    return describe_groups(specs, **defaults | {"max_num_seqs": 64} | settings)


def test_full_attention_keeps_every_token() -> None:
    assert described(FULL) == ([KvGroup(32)], 0)


def test_a_window_keeps_its_tokens_and_a_block_for_where_it_begins() -> None:
    groups, set_aside = described(FULL, WINDOW, WINDOW)
    assert groups == [KvGroup(32), KvGroup(32, 3), KvGroup(32, 3)]
    assert set_aside == 2 * 256 // 32, "a prompt's step, in both windows"


def test_drafts_and_steps_under_way_widen_a_window() -> None:
    groups, set_aside = described(WINDOW, step_tokens=17, num_steps=2)
    assert groups == [KvGroup(32, 5)]  # 63 + 34 tokens, and where it begins
    assert set_aside == 2 * 256 // 32


def test_attention_to_chunks_of_the_text_keeps_a_chunk() -> None:
    chunked = kv.ChunkedLocalAttentionSpec(
        block_size=32, attention_chunk_size=128, **HEADS
    )
    assert described(chunked)[0] == [KvGroup(32, 6)]


def test_states_take_the_same_of_any_length() -> None:
    assert described(state("none"))[0] == [KvGroup(160, 1)]
    assert described(state("align"))[0] == [KvGroup(160, 2)]
    assert described(state("align"), num_steps=2)[0] == [KvGroup(160, 3)]
    assert described(state("all"))[0] == [KvGroup(160)]
    drafting = state("align", num_speculative_blocks=16)
    assert described(drafting)[0] == [KvGroup(160, 2, 16)]


def test_states_kept_of_prompts_are_set_aside_once_for_all() -> None:
    keeping = state("align", num_prefill_checkpoint_blocks=1)
    # Prompts of more than a block, as many as two steps of so many tokens compute.
    groups = [KvGroup(160, 2), KvGroup(160, 2)]
    for batched_tokens, of_each in ((64, 0), (256, 3), (2048, 25), (100_000, 64)):
        found = described(keeping, keeping, batched_tokens=batched_tokens)
        assert found == (groups, 2 * of_each)
    assert described(state("align"), batched_tokens=2048)[1] == 0


def test_states_within_a_block_are_a_requests_own() -> None:
    keeping = state("align", num_prefill_checkpoint_blocks=1)
    assert described(FULL, keeping) == ([KvGroup(32), KvGroup(160, 2, 2)], 0)
    found = described(keeping, hash_tokens=80)
    assert found == ([KvGroup(160, 2, 2)], 0)
    assert described(FULL, state("align"))[0][1] == KvGroup(160, 2, 1)


def test_layers_of_one_type_and_several_sizes_are_one_group() -> None:
    wrapped = kv.UniformTypeKVCacheSpecs(
        block_size=32, kv_cache_specs={"a": WINDOW, "b": WINDOW}
    )
    assert described(wrapped)[0] == [KvGroup(32, 3)]


def test_what_is_not_known_is_taken_to_keep_every_token() -> None:
    assert described(SimpleNamespace(block_size=16)) == ([KvGroup(16)], 0)
