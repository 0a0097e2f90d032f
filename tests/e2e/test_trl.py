"""The real `trl.GRPOTrainer` on the tiny model: what generates is what is trained."""

from __future__ import annotations

import math
from typing import Any

import pytest

import aseer
from aseer.integrations.trl import rollout_func
from tests.e2e.tiny import tiny_config, tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

NUM_GENERATIONS = 4
STEPS = 3
PROMPTS = ["abc", "what is it", "123 + 4", "the end"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of TRL and what it uses
]


def model_logprobs(
    model: Any, prompt: list[int], completion: list[int]
) -> torch.Tensor:
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
        self.probes: list[torch.Tensor] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        out = self.inner(prompts, trainer)
        assert out["prompt_ids"] == [self.tokenizer.encode(p) for p in prompts]
        assert len(out["completion_ids"]) == len(out["logprobs"]) == len(prompts)
        assert len(set(map(tuple, out["completion_ids"]))) > len(prompts) // 2
        rows = zip(
            out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True
        )
        for prompt, completion, logprobs in rows:
            assert 0 < len(completion) <= 32
            own = model_logprobs(trainer.model, prompt, completion)
            assert torch.allclose(own, torch.tensor(logprobs), atol=1e-3)
        self.versions += set(out["weight_version"])
        probe = model_logprobs(trainer.model, [5, 6, 7], [8, 9, 10])
        self.probes.append(probe)
        return out


def test_a_trainer_of_trl_trains_on_what_its_own_weights_generate(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # a thread that never ends
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    rewarded: list[tuple[str, str]] = []

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        assert set(columns["finish_reason"]) <= {"stop", "length"}
        rewarded.extend(zip(prompts, completions, strict=True))
        return [sum(c.isalpha() for c in text) / 32 for text in completions]

    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2 * NUM_GENERATIONS,
        num_generations=NUM_GENERATIONS,
        max_completion_length=32,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    with aseer.Engine(tiny_config(num_instances=2, chunk_size=32)) as engine:
        watched = Watched(rollout_func(engine), tokenizer)
        trainer = GRPOTrainer(
            model=model,
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
            rollout_func=watched,
        )
        trainer.train()
        assert engine.weight_version == STEPS
    assert watched.versions == [1, 2, 3], "each step's rollout has its own weights"
    for before, after in zip(watched.probes, watched.probes[1:], strict=False):
        assert not torch.allclose(before, after, atol=1e-4), "they had been trained"
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert any(row.get("grad_norm", 0) > 0 for row in trainer.state.log_history)
    assert len(rewarded) == STEPS * 2 * NUM_GENERATIONS
