"""TRL's repeated prompts become groups, and its arguments sampling settings."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.integrations.trl import (
    Encoded,
    encoded,
    group_prompts,
    rollout_func,
    sampling_of,
)
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
    a, b, c = [1], [2], [1, 2]
    prompts = [Encoded(ids, []) for ids in (a, a, b, c, c, c, a)]
    groups = group_prompts(prompts, SamplingParams())
    assert [(g.prompt, g.n) for g in groups] == [(a, 2), (b, 1), (c, 3), (a, 1)]
    assert len({g.group_id for g in groups}) == 4


def test_the_trainers_settings_are_taken_and_ours_come_last():
    sampling = sampling_of(args_of(top_k=5, generation_kwargs={"min_tokens": 3}), {})
    assert (sampling.max_tokens, sampling.temperature) == (64, 0.7)
    assert (sampling.top_k, sampling.min_tokens, sampling.min_p) == (5, 3, 0.0)
    assert sampling_of(args_of(), {"temperature": 0.0}).temperature == 0.0


def test_a_setting_that_is_unknown_is_named():
    with pytest.raises(ConfigError, match="num_beams"):
        sampling_of(args_of(generation_kwargs={"num_beams": 2}), {})


class Trainer:
    """Encodes as TRL's trainer does, and keeps what it was asked to."""

    def __init__(self, images=None):
        self.images = images
        self.accelerator = SimpleNamespace(
            is_main_process=True,
            process_index=0,
            num_processes=1,
            distributed_type="NO",
            unwrap_model=lambda model: model,
            get_state_dict=lambda model: {},
        )
        self.state = SimpleNamespace(global_step=0)
        self.processing_class = SimpleNamespace()
        self.model = self.model_wrapped = SimpleNamespace(
            named_parameters=lambda **_: [], modules=lambda: []
        )
        self.args = args_of(chat_template_kwargs={"enable_thinking": False})

    def _tokenize_prompts(self, prompts):
        thinking = self.args.chat_template_kwargs["enable_thinking"]
        ids = [np.array([len(str(prompt)), 7 + thinking]) for prompt in prompts]
        return ids, self.images, {}


class Engine:
    """Answers every request with its prompt's last token."""

    def __init__(self):
        self.num_updates = 0
        self.config = EngineConfig(model="any")

    def update_weights_sync(self, source):
        del source
        self.num_updates += 1

    def rollout_sync(self, groups):
        self.groups = groups
        return self

    def by_group(self):
        for group in self.groups:
            yield [
                SimpleNamespace(
                    group_id=group.group_id,
                    prompt_token_ids=group.prompt,
                    token_ids=group.prompt[-1:],
                    logprobs=[0.0],
                    finish_reason="stop",
                    weight_version=1,
                )
                for _ in range(group.n)
            ]


def test_prompts_are_encoded_by_the_trainer_itself():
    pytest.importorskip("torch")
    engine = Engine()
    out = rollout_func(engine)([CHAT, CHAT, "abc"], Trainer())
    chat = [len(str(CHAT)), 7]
    assert [(g.prompt, g.n) for g in engine.groups] == [(chat, 2), ([3, 7], 1)]
    assert out["prompt_ids"] == [chat, chat, [3, 7]]
    assert {type(token) for ids in out["prompt_ids"] for token in ids} == {int}


def test_equal_prompts_with_other_images_are_other_groups():
    pytest.importorskip("torch")
    one = np.zeros((4, 4, 3), np.uint8)
    same, other = one.copy(), one + 1
    images = [[one], [one], [same], [other], [], None, [one, other]]
    engine = Engine()
    prompts = ["abc"] * len(images)
    rollout_func(engine)(prompts, Trainer(images=images))
    found = [(group.n, group.images) for group in engine.groups]
    assert [n for n, _ in found] == [3, 1, 2, 1]
    assert found[0][1][0] is one
    assert found[1][1][0] is other
    assert found[2][1] is None


@pytest.mark.parametrize(
    ("sampling", "generation_kwargs", "speculation", "expected"),
    [
        ({}, None, "off", {7: -1e20}),
        ({"logit_bias": {3: 1.0}}, None, "off", {3: 1.0}),
        ({"allowed_token_ids": [3]}, None, "off", None),
        ({}, {"allowed_token_ids": [3]}, "off", None),
        ({}, None, "dgds", None),  # vLLM refuses biases then
    ],
)
def test_a_model_that_sees_generates_no_image_token(
    sampling, generation_kwargs, speculation, expected
):
    pytest.importorskip("torch")
    trainer, engine = Trainer(), Engine()
    trainer.processing_class.image_token_id = 7
    trainer.args.generation_kwargs = generation_kwargs
    engine.config = EngineConfig(model="any", speculation=speculation)
    rollout_func(engine, sampling=sampling)(["abc"], trainer)
    (group,) = engine.groups
    assert group.sampling.logit_bias == expected


def test_a_trainer_that_encodes_otherwise_is_refused_with_words():
    with pytest.raises(ConfigError, match=r"object has no _tokenize_prompts"):
        encoded(object(), ["abc"])


@pytest.mark.parametrize(("is_main", "engine"), [(True, None), (False, object())])
def test_the_main_process_alone_has_the_engine(is_main, engine):
    accelerator = SimpleNamespace(
        is_main_process=is_main, process_index=1 - is_main, num_processes=2
    )
    trainer = SimpleNamespace(accelerator=accelerator)
    with pytest.raises(ConfigError, match=f"process {1 - is_main} of 2 gave"):
        rollout_func(engine)(["a"], trainer)


def test_weights_are_sent_after_a_step_and_to_another_trainer_or_training():
    pytest.importorskip("torch")
    engine = Engine()
    rollout, trainer = rollout_func(engine), Trainer()
    updates = []
    for change in ("none", "none", "step", "none", "trains again", "another trainer"):
        if change == "step":
            trainer.state.global_step = 1
        elif change == "trains again":
            trainer.state = SimpleNamespace(global_step=1)
        elif change == "another trainer":
            trainer = Trainer()
            trainer.state.global_step = 1
        rollout(["abc"], trainer)
        updates.append(engine.num_updates)
    assert updates == [1, 1, 2, 2, 3, 4]
