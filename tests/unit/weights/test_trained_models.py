"""What trainers have of a model is what its checkpoint needs, in every form.

Tiny models made by Transformers, and checkpoints as it saves them, or with the output
layer written a second time, as Qwen3-0.6B's has it.
"""

from __future__ import annotations

import json

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights.files import describe_checkpoint, map_tensors
from aseer.weights.sending import check_source
from tests.e2e.vision import make_vision
from tests.lazy import Lazy
from tests.unit.weights.made import send

torch = Lazy("torch")
transformers = Lazy("transformers")
safetensors = Lazy("safetensors.torch")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def model_of(*, tied, seed=0):
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return transformers.Qwen3ForCausalLM(config)


def describe(directory):
    tied = json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    return describe_checkpoint(str(directory), None, "F32", declares_tied=tied)


def add_output_layer(directory):
    """Have a checkpoint hold the tied weight twice."""
    file = directory / "model.safetensors"
    held = safetensors.load_file(file)
    safetensors.save_file(held | {HEAD: held[EMBEDDING].clone()}, file)


@pytest.fixture(params=["tied", "tied and saved twice", "not tied"])
def engine_and_model(request, tmp_path):
    """What an engine takes, and a model that was trained since."""
    tied = request.param != "not tied"
    directory = tmp_path / "engine"
    model_of(tied=tied).save_pretrained(directory)
    if request.param == "tied and saved twice":
        add_output_layer(directory)
    return describe(directory), model_of(tied=tied, seed=1)


def gathered(model):
    """As a sharded trainer's: every name has a copy of its own."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


SOURCES = {
    "module": lambda model: model,
    "state_dict": lambda model: model.state_dict(),
    "named_parameters": lambda model: model.named_parameters(),
    "every name": lambda model: model.named_parameters(remove_duplicate=False),
    "gathered": gathered,
    "gathered pairs": lambda model: iter(gathered(model).items()),
    "the output layer first": lambda model: reversed(gathered(model).items()),
    "data parallel": lambda model: torch.nn.DataParallel(model),
    "its state_dict": lambda model: torch.nn.DataParallel(model).state_dict(),
    "its pairs": lambda model: torch.nn.DataParallel(model).named_parameters(),
    "compiled": lambda model: torch.compile(model),
    "compiled pairs": lambda model: torch.compile(model).named_parameters(),
    "both pairs": lambda model: torch.nn.DataParallel(
        torch.compile(model)
    ).named_parameters(),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_whole_model_is_whole_in_every_form(engine_and_model, source, tmp_path):
    engine, model = engine_and_model
    given = source(model)
    check_source(given, awaits=False)
    found = dict(map_tensors(send(given, engine, tmp_path / "new")))
    assert found.keys() == engine.tensors.keys()
    expected = model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("twice", [False, True])
def test_a_whole_checkpoint_is_whole_however_it_was_saved(
    engine_and_model, twice, tmp_path
):
    engine, model = engine_and_model
    model.save_pretrained(tmp_path / "trained")
    if twice and model.config.tie_word_embeddings:
        add_output_layer(tmp_path / "trained")
    found = dict(map_tensors(send(tmp_path / "trained", engine, tmp_path / "new")))
    assert found.keys() == engine.tensors.keys()
    expected = model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture
def process_group():
    """Of one process, which talks to nobody."""
    dist = pytest.importorskip("torch.distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("source", ["module", "state_dict", "every name"])
def test_a_sharded_model_is_gathered(engine_and_model, source, tmp_path):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    engine, model = engine_and_model
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    assert isinstance(model.lm_head.weight, DTensor)
    given = SOURCES[source](model)
    found = dict(map_tensors(send(given, engine, tmp_path / "new")))
    assert found.keys() == engine.tensors.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.usefixtures("process_group")
def test_adapters_of_a_sharded_model_are_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    peft = pytest.importorskip("peft")
    model_of(tied=False).save_pretrained(tmp_path / "engine")
    settings = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(model_of(tied=False), settings)
    wrapped = torch.nn.DataParallel(model)
    found = send(wrapped, describe(tmp_path / "engine"), tmp_path / "whole")
    assert len(found.tensors) == len(model.get_base_model().state_dict()) - 4
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(WeightUpdateError, match=r"adapters .* sharded"):
        send(model, describe(tmp_path / "engine"), tmp_path / "new")


def test_a_model_that_is_not_tied_is_refused_by_an_engine_that_is(tmp_path):
    model_of(tied=True).save_pretrained(tmp_path / "engine")
    with pytest.raises(WeightUpdateError, match=r"differ.*tie_word_embeddings"):
        send(model_of(tied=False), describe(tmp_path / "engine"), tmp_path / "new")


def mixture_of(kind, seed=0):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "tie_word_embeddings": False,
    }
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "mixtral", "olmoe"])
@pytest.mark.parametrize("source", ["module", "state_dict", "wrapped", "pairs"])
def test_experts_in_one_tensor_are_taken_apart(kind, source, tmp_path):
    """As transformers does when it saves them."""
    mixture_of(kind).save_pretrained(tmp_path / "engine")
    model = mixture_of(kind, seed=1)
    model.save_pretrained(tmp_path / "trained")
    expected = safetensors.load_file(tmp_path / "trained" / "model.safetensors")
    held = model.state_dict()
    assert not held.keys() <= expected.keys(), "transformers has other names"
    given = {
        "module": model,
        "state_dict": held,
        "wrapped": {f"module._orig_mod.{k}": v for k, v in held.items()},
        "pairs": iter(held.items()),
    }[source]
    index = send(given, describe(tmp_path / "engine"), tmp_path / "new")
    found = dict(map_tensors(index))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_experts_that_do_not_fit_are_refused(tmp_path):
    mixture_of("qwen3_moe").save_pretrained(tmp_path / "engine")
    held = mixture_of("qwen3_moe").state_dict()
    name = next(name for name in held if name.endswith("gate_up_proj"))
    held[name] = held[name][:, :-2]
    with pytest.raises(WeightUpdateError, match=r"gate_proj.weight' has shape \[11"):
        send(held, describe(tmp_path / "engine"), tmp_path / "new")


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_a_model_that_sees_is_sent_by_its_names_in_memory(tmp_path, model_type):
    pytest.importorskip("torch")
    make_vision(tmp_path / "engine", model_type)
    make_vision(tmp_path / "trained", model_type, seed=1)
    trained = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "trained", dtype=torch.float32
    )
    spec = describe(tmp_path / "engine")
    if model_type == "qwen2_vl":
        assert not trained.state_dict().keys() <= spec.tensors.keys()
    sent = dict(map_tensors(send(trained.state_dict(), spec, tmp_path / "new")))
    expected = safetensors.load_file(tmp_path / "trained" / "model.safetensors")
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
