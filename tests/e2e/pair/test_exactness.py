"""I2 on real engines: dividing and moving a request changes nothing of what is sampled.

The reference is plain vLLM, in a process of its own, with the same settings: one
undivided run. Against it stands aseer with 32-token chunks on two engines, every chunk
sent to another engine than the one before.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.errors import RolloutError
from tests.e2e.tiny import IS_BITWISE, ROUNDING, by_request, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GREEDY = {"temperature": 0.0, "max_tokens": 200}
# Each a way in which a chunk boundary could show. The stop strings are characters that
# the tiny model's greedy responses hold at known places (see `test_stop_strings_...`).
CASES: dict[str, dict[str, Any]] = {
    "plain": GREEDY,
    "ignore_eos": GREEDY | {"ignore_eos": True},
    "min_tokens": GREEDY | {"min_tokens": 77},
    "presence": GREEDY | {"presence_penalty": 0.7},
    "frequency": GREEDY | {"frequency_penalty": 0.4},
    "repetition": GREEDY | {"repetition_penalty": 1.2},
    "logit_bias": GREEDY | {"logit_bias": {9: 2.0}},
    "allowed": GREEDY | {"allowed_token_ids": list(range(2, 60))},
    "stop_token": GREEDY | {"stop_token_ids": [20, 21, 22, 23]},
    "regex": GREEDY | {"structured_outputs": {"regex": "[a-f]{70}[0-9]{40}"}},
    "short": GREEDY | {"max_tokens": 1},
}
PROMPTS = [[5, 6, 7 + i] + [11 + i] * (13 * i) for i in range(4)]

REFERENCE = """
import json, sys

def main():
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    llm = LLM(**json.loads(sys.argv[1]), enforce_eager=True, block_size=32,
              disable_log_stats=True, logprobs_mode="processed_logprobs")
    for line in sys.stdin:
        job = json.loads(line)
        prompts, params = [], []
        for prompt, settings in job["work"]:
            structured = settings.pop("structured_outputs", None)
            bias = settings.pop("logit_bias", None)
            prompts.append({"prompt_token_ids": prompt})
            params.append(SamplingParams(
                **settings, logprobs=0,
                logit_bias=bias and {int(k): v for k, v in bias.items()},
                structured_outputs=structured and StructuredOutputsParams(**structured)
            ))
        results = []
        for request in llm.generate(prompts, params, use_tqdm=False):
            done = request.outputs[0]
            logprobs = zip(done.logprobs, done.token_ids)
            results.append({
                "token_ids": list(done.token_ids),
                "logprobs": [lp[t].logprob for lp, t in logprobs],
                "text": done.text,
                "finish_reason": done.finish_reason,
                "stop_reason": done.stop_reason,
            })
        json.dump(results, open(job["out"], "w"))
        print("DONE", flush=True)

if __name__ == "__main__":
    main()
"""


Work = list[tuple[list[int], dict[str, Any]]]


@contextmanager
def plain_vllm(tmp: Path) -> Iterator[Callable[[Work], list[Any]]]:
    """What an undivided run of vLLM itself generates for (prompt, settings) pairs."""
    script, log = tmp / "reference.py", tmp / "log"
    script.write_text(REFERENCE)
    engine = {
        "model": str(tiny_model()),
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 256 << 20,
    }
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_RPC_BASE_PATH": str(tmp)}
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(engine)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | env,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def generate(work: Work) -> list[Any]:
            out = tmp / "reference.json"
            job = json.dumps({"work": work, "out": str(out)})
            process.stdin.write(job + "\n")
            process.stdin.flush()
            assert "DONE\n" in process.stdout, log.read_text()[-3000:]
            return json.loads(out.read_text())

        try:
            yield generate
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


def matches(response: aseer.Response, expected: dict[str, Any]) -> None:
    assert response.token_ids == expected["token_ids"]
    if IS_BITWISE:
        assert response.logprobs == expected["logprobs"], "bit for bit"
    else:
        assert response.logprobs == pytest.approx(expected["logprobs"], abs=ROUNDING)
    assert response.text == expected["text"]
    assert response.finish_reason == expected["finish_reason"]
    if expected["stop_reason"] is not None:
        assert response.stop_reason == expected["stop_reason"]
    elif response.finish_reason == "stop":
        assert response.stop_reason == response.token_ids[-1], "the end token"


def stop_cases(texts: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Stop strings that begin before and end after a chunk's boundary, or hide
    elsewhere.

    Returns:
        (index of the prompt, settings), for texts of one character a token.
    """
    cases = []
    for i, text in enumerate(texts):
        boundary = 32 - len(PROMPTS[i]) % 32 + 1  # tokens in the first chunk
        stop = text[boundary - 2 : boundary + 2]
        assert len(stop) == 4, "the response is long enough to cross a boundary"
        base = GREEDY | {"ignore_eos": True, "stop": ["\\u2603", stop]}
        cases += [
            (i, base),
            (i, base | {"include_stop_str_in_output": True}),
            (i, base | {"min_tokens": text.find(stop) + 5}),
            (i, GREEDY | {"ignore_eos": True, "stop": [text[:1]], "min_tokens": 40}),
        ]
    return cases


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Plain vLLM's results: by case, and for the stop strings made from them."""
    with plain_vllm(tmp_path_factory.mktemp("reference")) as generate:
        # Each case by itself: up to 0.30 vLLM takes one request's allowed tokens for
        # those of others (`aseer.instance.vllm.rows`).
        cases = {
            name: generate([(prompt, settings) for prompt in PROMPTS])
            for name, settings in CASES.items()
        }
        stops = stop_cases([r["text"] for r in cases["ignore_eos"]])
        cases["stops"] = generate([(PROMPTS[i], dict(s)) for i, s in stops])
    return cases


@pytest.mark.usefixtures("always_migrate")
def test_divided_and_migrating_equals_plain_vllm(engine, expected):
    groups = [
        aseer.Group(prompt, n=2, sampling=settings, group_id=f"{name}-{i}")
        for name, settings in CASES.items()
        for i, prompt in enumerate(PROMPTS)
    ]
    rollout = engine.rollout_sync(groups)
    responses = by_request(list(rollout))
    for name in CASES:
        for i in range(len(PROMPTS)):
            for k in range(2):
                matches(responses[f"{name}-{i}/{k}"], expected[name][i])
    assert rollout.report.num_migrations > 40, "what waits for a place may go home"
    assert rollout.report.num_preemptions == 0
    whole = [responses[f"{n}-0/0"] for n in ("presence", "frequency", "regex")]
    assert [r.metrics.num_chunks for r in whole] == [1, 1, 1], "run undivided"
    assert responses["ignore_eos-0/0"].metrics.num_chunks == 7


@pytest.mark.usefixtures("always_migrate")
def test_stop_strings_that_span_a_boundary_equal_plain_vllm(engine, expected):
    stops = stop_cases([r["text"] for r in expected["ignore_eos"]])
    groups = [
        aseer.Group(PROMPTS[i], n=1, sampling=settings, group_id=f"s{k}")
        for k, (i, settings) in enumerate(stops)
    ]
    responses = by_request(list(engine.rollout_sync(groups)))
    for k in range(len(stops)):
        matches(responses[f"s{k}/0"], expected["stops"][k])
    assert Counter(r.finish_reason for r in responses.values())["stop"] >= 12


def test_a_resume_on_the_same_engine_computes_one_token(engine):
    group = aseer.Group(PROMPTS[0], n=1, sampling=GREEDY | {"ignore_eos": True})
    rollout = engine.rollout_sync([group])
    (response,) = rollout
    assert response.metrics.num_chunks == 7
    assert response.metrics.num_migrations == 0
    assert response.metrics.num_recomputed_tokens == 0


def test_members_of_a_group_are_distinct_on_all_engines(engine):
    sampling = {"temperature": 1.0, "max_tokens": 48, "ignore_eos": True}
    groups = [aseer.Group(PROMPTS[0], n=64, sampling=sampling)]
    for policy in ("context-aware", "group-round-robin", "least-loaded"):
        responses = list(engine.rollout_sync(groups, policy=policy))
        assert len({tuple(r.token_ids) for r in responses}) == 64


def test_text_and_chat_prompts_are_encoded_as_the_tokenizer_does(engine):
    sampling = {"temperature": 0.0, "max_tokens": 4}
    groups = [aseer.Group("hello", n=1, sampling=sampling)]
    (response,) = engine.rollout_sync(groups)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(engine.config.model)
    assert response.prompt_token_ids == tokenizer.encode("hello")


def test_a_vllm_sampling_params_object_is_taken(engine):
    vllm = pytest.importorskip("vllm")
    params = vllm.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    (response,) = engine.rollout_sync([aseer.Group([1, 2, 3], n=1, sampling=params)])
    assert len(response.token_ids) == 6
    refused = vllm.SamplingParams(max_tokens=5, prompt_logprobs=1)
    with pytest.raises(ValueError, match="prompt_logprobs"):
        engine.rollout_sync([aseer.Group([1, 2, 3], n=1, sampling=refused)])


# Temperature 1: next-token distributions before and after a boundary

NUM_SAMPLES = 4096
PROMPT_31 = [5 + i % 90 for i in range(31)]  # two tokens to the end of the first block
P_VALUE = 1e-3


def samples(
    engine: aseer.Engine, *, seed: int, chunk_size: int, max_tokens: int = 4
) -> list[list[int]]:
    """Token ids of `NUM_SAMPLES` responses to one prompt."""
    sampling = {
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "seed": seed,
        "top_p": 0.95,
    }
    group = aseer.Group(PROMPT_31, n=NUM_SAMPLES, sampling=sampling)
    responses = engine.rollout_sync([group], chunk_size=chunk_size)
    return [r.token_ids for r in responses]


def g_test(first: list[int], second: list[int]) -> float:
    """p-value of "both samples are of one distribution"; rare values are pooled."""
    a, b = Counter(first), Counter(second)
    pooled_a = pooled_b = statistic = 0.0
    cells = -1
    total_a, total_b = len(first), len(second)
    rows = []
    for value in set(a) | set(b):
        if a[value] + b[value] < 20:
            pooled_a += a[value]
            pooled_b += b[value]
        else:
            rows.append((a[value], b[value]))
    if pooled_a + pooled_b:
        rows.append((pooled_a, pooled_b))
    for x, y in rows:
        cells += 1
        both = (x + y) / (total_a + total_b)
        for seen, expected in ((x, total_a * both), (y, total_b * both)):
            if seen:
                statistic += 2 * seen * math.log(seen / expected)
    # Wilson and Hilferty's cube-root approximation of the chi-squared tail.
    z = ((statistic / cells) ** (1 / 3) - 1 + 2 / (9 * cells)) / math.sqrt(
        2 / (9 * cells)
    )
    return 0.5 * math.erfc(z / math.sqrt(2))


def columns(responses: list[list[int]]) -> list[list[int]]:
    """Tokens by position, then pairs of the tokens around the boundary."""
    singles = [[r[i] for r in responses] for i in range(4)]
    return [*singles, [r[1] * 1000 + r[2] for r in responses]]


def test_the_distribution_after_a_boundary_is_the_one_without(engine):
    whole = columns(samples(engine, seed=1, chunk_size=0))
    divided = columns(samples(engine, seed=2, chunk_size=2))
    values = [g_test(a, b) for a, b in zip(whole, divided, strict=True)]
    assert min(values) > P_VALUE, values


@pytest.mark.slow
def test_the_distribution_test_catches_a_wrong_temperature_after_a_boundary(engine):
    """What a resumed chunk would do if it lost a setting, made by hand."""
    whole = columns(samples(engine, seed=1, chunk_size=0))
    firsts = samples(engine, seed=2, chunk_size=0, max_tokens=2)
    groups = [
        aseer.Group(
            PROMPT_31 + first,
            n=1,
            group_id=str(i),
            sampling={
                "max_tokens": 2,
                "ignore_eos": True,
                "seed": i,
                "temperature": 1.5,
                "top_p": 0.95,
            },
        )
        for i, first in enumerate(firsts)
    ]
    rest = by_request(list(engine.rollout_sync(groups)))
    wrong = columns(
        [first + rest[f"{i}/0"].token_ids for i, first in enumerate(firsts)]
    )
    values = [g_test(a, b) for a, b in zip(whole, wrong, strict=True)]
    assert min(values[:2]) > P_VALUE, "before the boundary nothing differs"
    assert min(values[2:]) < P_VALUE, values


ONLY_STOP = 5


def test_a_token_without_a_logprob_is_an_error_and_not_a_sample(engine):
    # At first the only token that is allowed may not be sampled yet.
    none_left = {
        "allowed_token_ids": [ONLY_STOP],
        "stop_token_ids": [ONLY_STOP],
        "min_tokens": 4,
        "max_tokens": 8,
    }
    groups = [
        aseer.Group([5, 6, 7], n=2, sampling=none_left, group_id="bad"),
        aseer.Group([5, 6, 7], n=2, sampling={"max_tokens": 8}, group_id="good"),
    ]
    responses = []
    with pytest.raises(RolloutError, match=r"2 of 4 requests .*logprob"):
        for response in engine.rollout_sync(groups):
            responses.append(response)
    assert len(list(engine.rollout_sync(groups[1:]))) == 2, "the engine goes on"
    for response in responses:
        assert all(map(math.isfinite, response.logprobs))
        if response.group_id == "bad":
            assert response.finish_reason == "error"
            assert "leave no token that may be sampled" in str(response.error)
        else:
            assert response.finish_reason in ("stop", "length")
