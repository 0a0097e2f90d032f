"""TRL's repeated prompts become groups, and its arguments sampling settings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from aseer.errors import ConfigError
from aseer.integrations.trl import group_prompts, rollout_func, sampling_of
from aseer.sampling import SamplingParams

CHAT = [{"role": "user", "content": "hello"}]


def args_of(**changes):
    defaults = {
        "max_completion_length": 64,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "generation_kwargs": None,
    }
    return SimpleNamespace(**defaults | changes)


def test_runs_of_equal_prompts_are_groups_in_order():
    groups = group_prompts(["a", "a", "b", CHAT, CHAT, CHAT, "a"], SamplingParams())
    assert [(g.prompt, g.n) for g in groups] == [
        ("a", 2),
        ("b", 1),
        (CHAT, 3),
        ("a", 1),
    ]
    assert len({g.group_id for g in groups}) == 4


def test_the_trainers_settings_are_taken_and_ours_come_last():
    sampling = sampling_of(args_of(top_k=5, generation_kwargs={"min_tokens": 3}), {})
    assert (sampling.max_tokens, sampling.temperature) == (64, 0.7)
    assert (sampling.top_k, sampling.min_tokens, sampling.min_p) == (5, 3, 0.0)
    assert sampling_of(args_of(), {"temperature": 0.0}).temperature == 0.0


def test_a_setting_that_is_unknown_is_named():
    with pytest.raises(ConfigError, match="num_beams"):
        sampling_of(args_of(generation_kwargs={"num_beams": 2}), {})


@pytest.mark.parametrize(("is_main", "engine"), [(True, None), (False, object())])
def test_the_main_process_alone_has_the_engine(is_main, engine):
    accelerator = SimpleNamespace(
        is_main_process=is_main, process_index=1 - is_main, num_processes=2
    )
    trainer = SimpleNamespace(accelerator=accelerator)
    with pytest.raises(ConfigError, match=f"process {1 - is_main} of 2 gave"):
        rollout_func(engine)(["a"], trainer)
