"""A process of a `trl.GRPOTrainer`, alone or one of several.

    python -m tests.e2e.trl_trainer DIRECTORY
    torchrun --nproc-per-node 2 -m tests.e2e.trl_trainer DIRECTORY [FLAG]

A flag is --sharded, --lora or --chat.

It trains the model in `DIRECTORY/model`, compares what it is given with that, and
writes what it saw to `DIRECTORY/rank-<rank>.json`.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import aseer
from aseer.integrations.trl import rollout_func
from tests.e2e.tiny import tiny_config

NUM_GENERATIONS = 4
BATCH = 12  # of two processes each then has half of the second group
STEPS = 3
PROMPTS = ["abc", "what is it", "123 + 4", "the end"]
# The trainer's alone: the engine's tokenizer has none.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a' if enable_thinking else 'b' }}{% endif %}"
)
TEMPLATE_KWARGS = {"enable_thinking": False}
SHARDED = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    },
}


def model_logprobs(
    model: Any, prompt: list[int], completion: list[int]
) -> torch.Tensor:
    """The trainer's own (float32), of a completion's tokens."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    rows = logprobs[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]


class Watched:
    """A rollout_func that compares what comes back with the trainer's own model."""

    def __init__(self, inner: Any, tokenizer: Any) -> None:
        self.inner, self.tokenizer = inner, tokenizer
        self.versions: list[int] = []
        self.probes: list[list[float]] = []
        self.worst = 0.0  # error of a logprob
        self.prompts: list[list[Any]] = []
        self.weights = ""  # what holds the trainer's

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        self.weights = type(next(trainer.model.parameters()).data).__name__
        out = self.inner(prompts, trainer)
        assert out["prompt_ids"] == [self.encoded(p) for p in prompts]
        rows = list(
            zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True)
        )
        assert len({tuple(completion) for _, completion, _ in rows}) > len(prompts) // 2
        for prompt, completion, logprobs in rows:
            assert 0 < len(completion) <= 32
            own = model_logprobs(trainer.model, prompt, completion)
            off = (own - torch.tensor(logprobs)).abs().max()
            self.worst = max(self.worst, float(off))
        self.versions += set(out["weight_version"])
        self.probes.append(model_logprobs(trainer.model, [5, 6, 7], [8, 9]).tolist())
        self.prompts.append(prompts)
        return out

    def encoded(self, prompt: Any) -> list[int]:
        """As TRL encodes it, by the trainer's tokenizer and settings."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(prompt[0]["content"] + "b")


num_rewarded = 0


def reward(completions: list[Any], **columns: Any) -> list[float]:
    global num_rewarded
    num_rewarded += len(completions)
    assert set(columns["finish_reason"]) <= {"stop", "length"}
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(c.isalpha() for c in text) / 32 for text in texts]


def main(directory: Path, *, sharded: bool, lora: bool, chat: bool) -> None:
    state = PartialState(cpu=True)
    model_dir = directory / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts: list[Any] = list(PROMPTS)
    if chat:
        tokenizer.chat_template = TEMPLATE
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    config = GRPOConfig(
        output_dir=str(directory / "out"),
        per_device_train_batch_size=BATCH // state.num_processes,
        num_generations=NUM_GENERATIONS,
        max_completion_length=32,
        max_steps=STEPS,
        learning_rate=2e-2 if lora else 1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        chat_template_kwargs=TEMPLATE_KWARGS if chat else None,
        **(SHARDED if sharded else {}),
    )
    if sharded:  # Accelerate does that to processes that have another device only
        PartialState().distributed_type = DistributedType.MULTI_GPU
    settings = tiny_config(model=model_dir, num_instances=1, chunk_size=32)
    with aseer.Engine(settings) if state.is_main_process else nullcontext() as engine:
        watched = Watched(rollout_func(engine), tokenizer)
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            rollout_func=watched,
            peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
        )
        trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    seen = {
        "versions": watched.versions,
        "probes": watched.probes,
        "prompts": watched.prompts,
        "worst": watched.worst,
        "weights": watched.weights,
        "losses": [row["loss"] for row in log],
        "gradients": [row["grad_norm"] for row in log],
        "num_rewarded": num_rewarded,
    }
    rank = trainer.accelerator.process_index
    (directory / f"rank-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    flags = ("sharded", "lora", "chat")
    main(Path(sys.argv[1]), **{flag: f"--{flag}" in sys.argv for flag in flags})
