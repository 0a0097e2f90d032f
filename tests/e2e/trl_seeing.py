"""A `trl.GRPOTrainer` of a model that sees, whose prompts have images.

    python -m tests.e2e.trl_seeing DIRECTORY MODEL

It trains the model, compares what it is given with that, and writes what it saw to
`DIRECTORY/seen.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

import aseer
from aseer.integrations.trl import rollout_func
from tests.e2e.tiny import tiny_config
from tests.e2e.vision import IMAGE, vision_env

NUM_GENERATIONS = 3
STEPS = 2
MAX_TOKENS = 48
# Two of one text, with other images.
TEXTS = ["what is it", "what is it", "abc"]


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8))


class Watched:
    """A rollout_func that compares what comes back with the trainer's own model."""

    def __init__(self, inner: Any, processor: Any) -> None:
        self.inner, self.processor = inner, processor
        self.num_tokens_of_images: set[int] = set()
        self.num_distinct = 0
        self.versions: list[int] = []
        self.worst = 0.0  # error of a logprob

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        out = self.inner(prompts, trainer)
        columns = (out["prompt_ids"], out["completion_ids"], out["logprobs"])
        for prompt, ids, completion, logprobs in zip(prompts, *columns, strict=True):
            assert IMAGE not in completion, "it would be taken for an image"
            self.num_tokens_of_images.add(ids.count(IMAGE))
            parts = [part for message in prompt for part in message["content"]]
            (image,) = (part["image"] for part in parts if part["type"] == "image")
            own = self.model_logprobs(trainer.model, ids, completion, image)
            off = (own - torch.tensor(logprobs)).abs().max()
            self.worst = max(self.worst, float(off))
        self.num_distinct = len(set(map(tuple, out["completion_ids"])))
        self.versions += set(out["weight_version"])
        return out

    def model_logprobs(
        self, model: Any, prompt: list[int], completion: list[int], image: Any
    ) -> torch.Tensor:
        """The trainer's own, of tokens that are no image's."""
        pixels = self.processor.image_processor(images=[image], return_tensors="pt")
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            kinds = (ids == IMAGE).int()
            logits = model(ids, mm_token_type_ids=kinds, **pixels).logits[0]
        logits[:, IMAGE] = -torch.inf
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]


def reward(completions: list[Any], **_: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isalpha() for c in text) / MAX_TOKENS for text in texts]


def main(directory: Path, model_dir: Path) -> None:
    processor = AutoProcessor.from_pretrained(model_dir)
    rows = [
        {"prompt": [{"role": "user", "content": text}], "image": picture(i)}
        for i, text in enumerate(TEXTS)
    ]
    config = GRPOConfig(
        output_dir=str(directory / "out"),
        per_device_train_batch_size=NUM_GENERATIONS * len(TEXTS),
        num_generations=NUM_GENERATIONS,
        max_completion_length=MAX_TOKENS,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    settings = tiny_config(
        model=model_dir, num_instances=1, chunk_size=32, env=vision_env()
    )
    with aseer.Engine(settings) as engine:
        watched = Watched(rollout_func(engine), processor)
        trainer = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(
                model_dir, dtype=torch.float32
            ),
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
            rollout_func=watched,
        )
        trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    seen = {
        "num_tokens_of_images": sorted(watched.num_tokens_of_images),
        "num_distinct": watched.num_distinct,
        "versions": watched.versions,
        "worst": watched.worst,
        "losses": [row["loss"] for row in log],
        "gradients": [row["grad_norm"] for row in log],
    }
    (directory / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
