"""Speculation's settings, what they make of engine arguments, and its figures."""

from __future__ import annotations

from bisect import bisect_left

import pytest

import aseer
from aseer.counts import DRAFTING_SHARES, DraftCounts
from aseer.errors import ConfigError
from aseer.node.machine import Machine
from aseer.runtime.launch import plan_instances

MACHINE = Machine(
    gpus=(),
    cores=(0, 1),
    free_memory_bytes=1 << 34,
    cpu_only=True,
    cpu_dtype="float32",
)


def args_of(speculation, **settings):
    config = aseer.EngineConfig(
        model="m", device="cpu", speculation=speculation, **settings
    )
    return plan_instances(config, MACHINE)[0].engine_args


def test_a_methods_name_stands_for_its_settings():
    config = aseer.EngineConfig(model="m", speculation="dgds")
    assert config.speculation == aseer.SpeculationConfig(method="dgds")
    assert aseer.EngineConfig(model="m").speculation.method == "off"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "guess"},
        {"budget": "none"},
        {"max_draft_tokens": 0},
        {"max_draft_tokens": 8, "tail_draft_tokens": 4},
        {"probe_weight": 0.5},
        {"after_weight_update": "maybe"},
        {"group_ttl_s": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError):
        aseer.SpeculationConfig(**settings)


def test_without_speculation_nothing_is_drafted():
    args = args_of("off")
    assert "speculative_config" not in args


def test_dgds_drafts_through_vllms_hook_with_room_for_the_longest_draft():
    args = args_of(aseer.SpeculationConfig(max_draft_tokens=4, tail_draft_tokens=12))
    assert args["speculative_config"]["method"] == "custom_class"
    assert args["speculative_config"]["num_speculative_tokens"] == 12
    assert "worker_extension_cls" in args


def test_vllms_own_methods_get_the_mended_sampler_too():
    args = args_of("ngram")
    expected = {"method": "ngram", "num_speculative_tokens": 8}
    assert args["speculative_config"] == expected
    assert "worker_extension_cls" in args


def test_a_drafter_that_the_user_configures_gets_the_mended_sampler_too():
    own = {"method": "eagle", "num_speculative_tokens": 2}
    args = args_of("off", engine_args={"speculative_config": own})
    assert args["speculative_config"] == own
    assert "worker_extension_cls" in args


def test_counts_add_up_and_give_the_acceptance_length():
    one = DraftCounts(num_drafts=2, drafted=(2, 1), accepted=(1,), step_s=1.0)
    other = DraftCounts(num_drafts=2, drafted=(2,), accepted=(2,), draft_s=0.5)
    total = one + other
    assert total.drafted == (4, 1)
    assert total.acceptance_length == 1 + 3 / 4
    assert total.drafting_share == 0.5
    assert total - other == DraftCounts(
        num_drafts=2, drafted=(2, 1), accepted=(1,), step_s=1.0
    )
    assert DraftCounts().acceptance_length == 1.0


def test_the_share_of_drafting_is_known_of_the_worst_step_too():
    buckets = [0] * (len(DRAFTING_SHARES) + 1)
    buckets[bisect_left(DRAFTING_SHARES, 0.01)] = 99
    buckets[bisect_left(DRAFTING_SHARES, 0.2)] = 1
    counts = DraftCounts(share_buckets=tuple(buckets))
    assert 0.01 <= counts.drafting_share_of(0.5) <= 0.015
    assert 0.2 <= counts.drafting_share_of(1.0) <= 0.3
    assert (counts - counts).drafting_share_of(1.0) == 0
    assert DraftCounts(share_buckets=(0,) * 20 + (1,)).drafting_share_of(1.0) == 1
