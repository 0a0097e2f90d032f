"""The real model: prepared, readable, and able to answer a question."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from aseer.models.smollm2 import prepare

# A process of its own: transformers warns, and keeps threads and files.
ANSWER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
path, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**prompt, do_sample=False, max_new_tokens=32)[0].tolist()
texts = ["plain", "12345 + 67", "naïve ☕ 東京 🙂"]
print(json.dumps({
    "prompt": tokenizer.decode(prompt["input_ids"][0]),
    "answer": tokenizer.decode(output[prompt["input_ids"].shape[1]:]),
    "round_trips": {t: tokenizer.decode(tokenizer.encode(t)) for t in texts},
    "digits": len(tokenizer.encode("12345")),
    "rope_theta": model.config.rope_parameters["rope_theta"],
    "is_tied": model.lm_head.weight is model.model.embed_tokens.weight,
}))
"""


@pytest.mark.e2e
def test_the_prepared_model_knows_the_capital_of_france() -> None:
    path = prepare(dtype="float32")
    assert prepare(dtype="float32") == path
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, path, "What is the capital of France?"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in found["answer"]
    assert found["answer"].endswith("<|im_end|>")
    assert found["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert all(text == back for text, back in found["round_trips"].items())
    assert found["digits"] == 5
    assert found["rope_theta"] == 100000.0
    assert found["is_tied"]
