"""What follows a rollout knows prompts by their tokens and their images."""

from __future__ import annotations

from dataclasses import replace

from aseer.context import LengthPriors
from aseer.controller import Controller
from aseer.inputs.prompt_image import PromptImage
from aseer.runtime.followers import learn_length, with_priors
from aseer.types import GroupId
from tests.unit.builders import info_of, report_of, task_of


def test_a_length_is_not_expected_of_the_same_tokens_with_another_image() -> None:
    one, other = (
        (PromptImage(key=key, path="", start=1, num_tokens=2),) for key in "ab"
    )
    task = replace(task_of("g", num_requests=1, max_tokens=9), images=one)
    controller = Controller(policy="context-aware", chunk_size=0)
    controller.instance_up(info_of(), 0.0)
    controller.add_groups([task], 0.0)
    controller.progress([report_of(0, range(7), end="stop")], 1.0)
    priors = LengthPriors()
    learn_length(priors, controller, GroupId("g"))
    tasks = [replace(task, images=images) for images in (one, other, ())]
    found = [task.length_prior for task in with_priors(priors, tasks)]
    assert found == [7, None, None]
