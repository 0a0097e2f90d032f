"""I4 on real engines: after an update nothing comes from old weights, old KV or drafts.

The yardstick is a fresh engine that was started from the new checkpoint: greedy float32
responses are equal to its token for token and logprob for logprob.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import aseer
from aseer.kv.pool import KvPool
from aseer.models.tiny import make_tiny
from aseer.runtime.followers import KvUpkeep
from tests.e2e.extension import SAYS
from tests.e2e.tiny import by_request, tiny_config, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

torch = pytest.importorskip("torch")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
GREEDY = {"temperature": 0.0, "max_tokens": 150, "ignore_eos": True}
# Longer than a KV block, and the same in every rollout: old KV would be found.
GROUPS = [
    aseer.Group([5 + i + k % 90 for k in range(70)], n=2, sampling=GREEDY)
    for i in range(4)
]


def roll(engine: aseer.Engine) -> dict[str, tuple[list[int], list[float]]]:
    responses = by_request(list(engine.rollout_sync(GROUPS)))
    assert {r.weight_version for r in responses.values()} == {engine.weight_version}
    return {k: (r.token_ids, r.logprobs) for k, r in responses.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same tokens, and logprobs as far as an engine repeats them.

    Whether a sibling finds the prompt in the prefix cache is a matter of timing; what
    is computed in other pieces, or with other rows, has other last bits.
    """
    assert found.keys() == expected.keys()
    for request_id, (tokens, logprobs) in expected.items():
        assert found[request_id][0] == tokens
        assert found[request_id][1] == pytest.approx(logprobs, abs=1e-4)


def state_dict_of(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def trained() -> Any:
    """The tiny model after one step of AdamW with a large learning rate.

    Made once: where a gradient is about 0, its rounding decides on a weight's step.
    """
    from transformers import AutoConfig, LlamaForCausalLM

    model = LlamaForCausalLM(AutoConfig.from_pretrained(tiny_model()))
    model.load_state_dict(state_dict_of(tiny_model()))
    tokens = torch.arange(5, 85).repeat(4, 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimiser.step()
    return model


@pytest.fixture(scope="module")
def checkpoint(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the trained model; what else it needs is the tiny model's."""
    directory = tmp_path_factory.mktemp("trained")
    make_tiny(directory)
    from safetensors.torch import save_file

    new = {k: v.detach().clone() for k, v in trained.state_dict().items()}
    assert new.keys() == state_dict_of(directory).keys()
    save_file(new, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, Any]:
    """What a fresh engine makes of the trained model."""
    with aseer.Engine(tiny_config(num_instances=1, model=checkpoint)) as engine:
        return roll(engine)


def until(condition: Callable[[], object], timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_after_an_update_responses_are_those_of_a_fresh_engine(
    engine, expected, trained, checkpoint
):
    old = roll(engine)
    assert all(expected[k] != old[k] for k in old)
    for source in (trained, iter(state_dict_of(checkpoint).items()), checkpoint):
        engine.update_weights_sync(source)
        assert_same(roll(engine), expected)
        engine.update_weights_sync(state_dict_of(tiny_model()))
        assert_same(roll(engine), old)


def test_a_users_extension_is_in_the_workers_beside_ours(engine):
    """The updates of this page go by calls that ours has."""
    for path in engine.log_paths[:2]:
        assert f"{SAYS} WorkerExtensionWithExtension" in path.read_text()


@pytest.mark.slow
def test_drafts_of_old_responses_change_nothing(expected, trained):
    config = tiny_config(num_instances=1, chunk_size=64, speculation="dgds")
    with aseer.Engine(config) as engine:
        roll(engine)
        engine.update_weights_sync(trained)
        found = roll(engine)
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("always_migrate")
def test_kv_of_old_weights_in_the_pool_is_neither_read_nor_kept(
    expected, trained, monkeypatch
):
    pytest.importorskip("lmcache")
    monkeypatch.setattr(KvUpkeep, "finished", lambda *_: None)  # all of it stays hot
    with aseer.Engine(
        tiny_config(
            num_instances=2,
            chunk_size=64,
            kv_pool=aseer.KvPoolConfig(mode="lmcache", chunk_tokens=64),
        )
    ) as engine:
        pool = engine._host.kv_pool
        old = roll(engine)
        until(lambda: pool.counts.resident > 0)
        with monkeypatch.context() as patch:
            patch.setattr(KvPool, "drop_older", _do_nothing)
            engine.update_weights_sync(trained)
        assert pool.counts.resident > 0, "the version in the keys is to be enough"
        rollout = engine.rollout_sync(GROUPS)
        found = by_request(list(rollout))
        assert_same({k: (r.token_ids, r.logprobs) for k, r in found.items()}, expected)
        assert rollout.report.kv.num_loads > 0, "of what the new weights made"
        engine.update_weights_sync(state_dict_of(tiny_model()))
        assert pool.counts.resident == 0
        assert_same(roll(engine), old)


async def _do_nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize("kind", ["name", "shape", "dtype", "nan"])
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_still_work(engine, kind):
    engine.update_weights_sync(state_dict_of(tiny_model()))  # empties the caches
    old = roll(engine)
    bad = state_dict_of(tiny_model())
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "name":
        bad["model.layers.9.mlp.up_proj.weight"] = bad.pop(name)
    elif kind == "shape":
        bad[name] = bad[name].t().contiguous()
    elif kind == "dtype":
        bad[name] = bad[name].to(torch.int32)
    else:
        bad[name][3, 4] = float("nan")
    version = engine.weight_version
    with pytest.raises(aseer.WeightUpdateError, match=r"layers\.(1|9)\.mlp\.up_proj"):
        engine.update_weights_sync(bad)
    assert engine.weight_version == version
    assert_same(roll(engine), old)


@pytest.mark.slow
def test_killed_instances_come_back_with_the_new_weights(engine, expected, trained):
    engine.update_weights_sync(trained)
    victims = {instance.pid for instance in engine.instances}
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len({i.pid for i in engine.instances} - victims) == 2)
    assert_same(roll(engine), expected)


SENDER = """
import pickle, sys
from safetensors.torch import load_file
target = pickle.load(open(sys.argv[1], "rb"))
target.send(iter(load_file(sys.argv[2]).items()))
assert "vllm" not in sys.modules
"""


def test_another_process_sends_what_a_fresh_engine_has(
    engine, expected, checkpoint, tmp_path
):
    engine.update_weights_sync(state_dict_of(tiny_model()))
    old, version = roll(engine), engine.weight_version
    target = engine.begin_update_sync(version=version + 10)
    (tmp_path / "target").write_bytes(pickle.dumps(target))
    weights = checkpoint / "model.safetensors"
    command = [sys.executable, "-c", SENDER, tmp_path / "target", weights]
    subprocess.run(command, check=True, timeout=200)
    report = engine.finish_update_sync(target)
    assert engine.weight_version == report.version == version + 10
    assert report.num_tensors == len(state_dict_of(checkpoint))
    assert_same(roll(engine), expected)
    target = engine.begin_update_sync()
    engine.abandon_update_sync(target)
    assert_same(roll(engine), expected)
    engine.update_weights_sync(state_dict_of(tiny_model()))
    assert_same(roll(engine), old)


def make_tied(directory: Path, seed: int, *, twice: bool) -> Path:
    """A tiny model with one weight for both of its ends, saved once or twice."""
    from safetensors.torch import save_file

    make_tiny(directory, seed=seed)
    config = directory / "config.json"
    tied = json.loads(config.read_text()) | {"tie_word_embeddings": True}
    config.write_text(json.dumps(tied))
    weights = state_dict_of(directory)
    weights[EMBEDDING] *= 0.1  # else a token is followed by itself
    weights[HEAD] = weights[EMBEDDING].clone()
    if not twice:
        del weights[HEAD]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True], ids=["one name", "two names"])
def test_an_output_layer_that_shares_the_embedding_follows_it(engine, tmp_path, twice):
    """Whatever names the engine's checkpoint has, and whatever the trainer gives."""
    old = make_tied(tmp_path / "old", 1, twice=twice)
    new = make_tied(tmp_path / "new", 2, twice=not twice)
    both = state_dict_of(make_tied(tmp_path / "both", 2, twice=True))
    engine.update_weights_sync(both)  # this one has an output layer of its own
    expected = roll(engine)
    one = {name: tensor for name, tensor in both.items() if name != HEAD}
    other = {name: tensor for name, tensor in both.items() if name != EMBEDDING}
    with aseer.Engine(tiny_config(num_instances=1, model=old)) as tied:
        before = roll(tied)
        assert before != expected
        for source in (new, both, iter(one.items()), iter(other.items())):
            tied.update_weights_sync(source)
            assert_same(roll(tied), expected)
            tied.update_weights_sync(old)
            assert_same(roll(tied), before)
        apart = both | {HEAD: both[HEAD] + 1}
        with pytest.raises(aseer.WeightUpdateError, match="the engine has one tensor"):
            tied.update_weights_sync(apart)
        assert_same(roll(tied), before)


def test_on_a_cpu_sleep_says_why_not(engine):
    import asyncio

    with pytest.raises(aseer.EngineError, match="cannot sleep on a CPU"):
        asyncio.run(engine.sleep())
