"""What is sent is what engines map, whatever it came from; errors leave no index."""

from __future__ import annotations

import asyncio
import weakref
from collections import namedtuple
from collections.abc import Mapping

import pytest

from aseer.errors import WeightUpdateError
from aseer.weights import sending
from aseer.weights.checks import ModelSpec, TensorSpec
from aseer.weights.files import describe_checkpoint, map_tensors, read_index
from aseer.weights.sending import check_source
from tests.lazy import Lazy
from tests.unit.weights.made import send, send_async

torch = Lazy("torch")

NAMES = {
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int64": "I64",
    "torch.float8_e4m3fn": "F8_E4M3",
}
Space = namedtuple("Space", "f_blocks f_bavail f_frsize")


def tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(7, dtype=torch.bfloat16),
        "halves": torch.randn(2, 2, dtype=torch.float16),
        "count": torch.tensor(5),
        "empty": torch.empty(0, 4),
    }


def model_of(given, dtype="F32", tied=()):
    specs = {
        k: TensorSpec(NAMES[str(t.dtype)], tuple(t.shape)) for k, t in given.items()
    }
    return ModelSpec(specs, dtype, list(tied))


def sent(source, model, directory):
    check_source(source, awaits=False)
    send(source, model, directory)
    return dict(map_tensors(read_index(str(directory / "index.json"))))


def module_of(given):
    module = torch.nn.Module()
    for name, tensor in given.items():
        module.register_buffer(name.replace(".", "_"), tensor)
    return module


def save(given, directory):
    from safetensors.torch import save_file

    directory.mkdir(exist_ok=True)
    save_file(given, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("kind", ["state_dict", "pairs", "module", "directory", "str"])
def test_every_source_arrives_bit_for_bit(kind, tmp_path):
    given = tensors()
    source = given
    if kind == "pairs":
        source = iter(given.items())
    elif kind == "module":
        given = {k.replace(".", "_"): t for k, t in given.items()}
        source = module_of(given)
    elif kind in ("directory", "str"):
        source = save(given, tmp_path / "checkpoint")
        model = describe_checkpoint(str(source), None, "F32", declares_tied=False)
        assert model == model_of(given)
        source = str(source) if kind == "str" else source
    found = sent(source, model_of(given), tmp_path / "new")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


async def test_an_async_iterable_arrives_and_is_closed_if_it_is_refused(tmp_path):
    given, closed = tensors(), []

    async def pairs(given):
        try:
            for pair in given.items():
                await asyncio.sleep(0)
                yield pair
        finally:
            await asyncio.sleep(0)
            closed.append(len(given))

    source, model = pairs(given), model_of(given)
    check_source(source, awaits=True)
    index = await send_async(source, model, tmp_path / "new")
    assert all(torch.equal(t, given[name]) for name, t in map_tensors(index))
    with pytest.raises(WeightUpdateError, match="no tensor 'z'"):
        await send_async(
            pairs({"z": torch.zeros(1), "y": torch.zeros(1)}), model, tmp_path / "other"
        )
    assert closed == [5, 2]
    with pytest.raises(WeightUpdateError, match="needs `await Engine"):
        check_source(pairs(given), awaits=False)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_source_is_asked_for_its_tensors_once(wrapped, tmp_path):
    class Module(torch.nn.Module):
        num_asked = 0

        def state_dict(self, *args, **kwargs):
            Module.num_asked += 1
            return super().state_dict(*args, **kwargs)

    module = Module()
    module.register_buffer("w", torch.ones(2))
    model = model_of({"w": module.w})
    source = torch.nn.DataParallel(module) if wrapped else module
    assert sent(source, model, tmp_path / "new").keys() == {"w"}
    assert Module.num_asked == 1


def test_an_iterable_is_iterated_once_and_no_tensor_of_it_is_kept(tmp_path):
    given = model_of({"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)})
    alive = []

    def pairs():
        for name in given.tensors:
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.ones(4)
            alive.append(weakref.ref(tensor))
            yield name, tensor

    assert sent(pairs(), given, tmp_path / "new").keys() == {"a", "b", "c"}
    assert len(alive) == 3


def views():
    huge = torch.randn(1000, 10)
    return {
        "transposed, with gradients": torch.randn(4, 6).t().requires_grad_(),
        "of a huge storage": huge[5:7, ::3],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "scalar": huge[0, 0],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


class OneAtATime(Mapping):
    """Makes every tensor in the memory of the one before."""

    def __init__(self, num, size):
        self._num, self._memory = num, torch.zeros(size)

    def __getitem__(self, name):
        return self._memory.fill_(int(name))

    def __iter__(self):
        return (str(i) for i in range(self._num))

    def __len__(self):
        return self._num


def test_a_mapping_that_makes_its_tensors_in_one_memory_arrives(tmp_path):
    source = OneAtATime(8, 3_000_000)  # several blocks each
    model = model_of({str(i): torch.zeros(3_000_000) for i in range(8)})
    found = sent(source, model, tmp_path / "new")
    assert all(bool((found[str(i)] == i).all()) for i in range(8))


def test_tensors_of_any_layout_in_memory_arrive(tmp_path):
    given = views()
    found = sent(given, model_of(given), tmp_path / "new")
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor), name
    assert (tmp_path / "new" / "data").stat().st_size < 1000


def test_master_weights_are_rounded_to_what_the_engine_has(tmp_path):
    given = {"w": torch.randn(100)}
    rounded = {"w": given["w"].bfloat16()}
    found = sent(given, model_of(rounded, "BF16"), tmp_path / "new")["w"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rounded["w"])
    too_large = {"w": torch.full((100,), 1e5)}
    model = model_of({"w": torch.zeros(100).half()}, "F16")
    with pytest.raises(WeightUpdateError, match=r"'w' has values .* infinite as F16"):
        sent(too_large, model, tmp_path / "other")


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("kind", ["state_dict", "pairs", "directory"])
@pytest.mark.parametrize("names", [(EMBEDDING,), (EMBEDDING, HEAD)], ids=["one", "two"])
@pytest.mark.parametrize(
    "given", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD), (HEAD, EMBEDDING)]
)
def test_tied_names_all_get_the_one_value(kind, names, given, tmp_path):
    """Whichever of them the checkpoint has, and whichever are given."""
    values = torch.randn(8, 4)
    held = {name: values.clone() for name in given} | {"norm": torch.randn(3)}
    model = model_of(dict.fromkeys(names, values) | {"norm": held["norm"]}, tied=names)

    def source(held):
        if kind == "directory":
            return save(held, tmp_path / "checkpoint")
        return held if kind == "state_dict" else iter(held.items())

    found = sent(source(held), model, tmp_path / "new")
    assert found.keys() == {*names, "norm"}
    assert all(torch.equal(found[name], values) for name in names)
    index = read_index(str(tmp_path / "new" / "index.json"))
    assert index.num_bytes == 4 * (32 + 3)
    if len(given) == 2:
        held[given[1]][7, 3] += 1
        with pytest.raises(WeightUpdateError, match="differ, but the engine has one"):
            sent(source(held), model, tmp_path / "other")


def test_an_output_layer_of_its_own_is_needed_and_may_differ(tmp_path):
    given = {EMBEDDING: torch.randn(8, 4), HEAD: torch.randn(8, 4)}
    found = sent(given, model_of(given), tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    with pytest.raises(WeightUpdateError, match=r"not given: 'lm_head.weight'"):
        sent({EMBEDDING: given[EMBEDDING]}, model_of(given), tmp_path / "other")


def test_a_shared_tensor_that_the_model_lacks_is_left_out(tmp_path):
    given = {"layers.0.w": torch.randn(4, 2)}
    shared = given | {"layers.1.w": given["layers.0.w"]}
    assert sent(shared, model_of(given), tmp_path / "new").keys() == {"layers.0.w"}
    own = given | {"layers.1.w": given["layers.0.w"].clone()}
    with pytest.raises(WeightUpdateError, match=r"no tensor 'layers.1.w'"):
        sent(own, model_of(given), tmp_path / "other")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_bad_value_is_found(bad, dtype, tmp_path):
    given = {"w": torch.zeros(1000, dtype=getattr(torch, dtype))}
    given["w"][777] = bad
    with pytest.raises(WeightUpdateError, match="'w' has values that are NaN"):
        sent(given, model_of(given), tmp_path / "new")
    assert not (tmp_path / "new" / "index.json").exists()


def test_a_checkpoint_with_a_bad_value_is_refused(tmp_path):
    given = {"w": torch.full((10,), float("nan"))}
    save(given, tmp_path)
    with pytest.raises(WeightUpdateError, match="'w' has values that are NaN"):
        sent(tmp_path, model_of(given), tmp_path / "new")


def fake():
    with Lazy("torch._subclasses").FakeTensorMode():
        return torch.ones(2)


@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize(
    ("made", "match"),
    [
        (
            lambda: torch.ones(2, device="meta"),
            "'w' has no values: it is on the meta device",
        ),
        (lambda: torch.ones(2).to_sparse(), r"'w' is torch.sparse_coo; .*\.to_dense"),
        (fake, "'w', a FakeTensor, cannot be read"),
        (
            lambda: torch.ones(2).numpy(),
            "'w' is a ndarray, not a tensor; torch.from_numpy",
        ),
        (lambda: [1.0, 1.0], "'w' is a list, not a tensor"),
        (lambda: None, "'w' is a NoneType, not a tensor"),
        (
            lambda: torch.ones(2, dtype=torch.complex64),
            "dtype complex64; the model's has F32",
        ),
    ],
)
def test_what_is_no_tensor_with_values_is_refused_by_its_name(
    made, match, is_held, tmp_path
):
    values = made()
    model = model_of({"w": torch.ones(2)})
    source = {"w": values} if is_held else iter([("w", values)])
    with pytest.raises(WeightUpdateError, match=match):
        sent(source, model, tmp_path / "new")
    assert not (tmp_path / "new" / "index.json").exists()


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: 5, "not a int"),
        (lambda: None, "not a NoneType"),
        (lambda: b"weights", "not a bytes"),
        (lambda: "/no/such/directory", "there is no directory '/no/such/directory'"),
        (lambda: torch.nn.Linear(1, 1).named_parameters, "not a method"),
        (lambda: torch.nn.Linear, "not a type"),
        (lambda: [torch.ones(2, 2)], "gave a Tensor, which is no pair"),
        (lambda: ["w"], "gave a str, which is no pair"),
        (lambda: [("w", torch.ones(2), 3)], "gave a tuple, which is no pair"),
        (lambda: [(5, torch.ones(2))], "a name is a int"),
        (lambda: {5: torch.ones(2)}, "a name is a int"),
        (lambda: [(["w"], torch.ones(2))], "a name is a list"),
        (lambda: torch.tensor(5.0), "not a Tensor"),
        (list, "1 of the model's 1 tensors were not given: 'w'"),
        (dict, "1 of the model's 1 tensors were not given: 'w'"),
    ],
)
def test_what_are_no_weights_is_said(made, match, tmp_path):
    source = made()
    with pytest.raises(WeightUpdateError, match=match):
        sent(source, model_of({"w": torch.ones(2)}), tmp_path / "new")


def test_what_a_source_raises_is_the_callers(tmp_path):
    def broken():
        yield "w", torch.ones(2)
        raise KeyError("shard 3")

    with pytest.raises(KeyError, match="shard 3"):
        sent(broken(), model_of({"w": torch.ones(2)}), tmp_path / "new")


def test_a_mapping_is_looked_at_as_a_whole_before_any_of_it_is_written(tmp_path):
    model = model_of({"a": torch.ones(2), "z": torch.ones(2)})
    with pytest.raises(WeightUpdateError, match="'z' has shape"):
        sent({"a": torch.ones(2), "z": torch.ones(3)}, model, tmp_path / "new")
    assert (tmp_path / "new" / "data").stat().st_size == 0


@pytest.mark.parametrize("is_held", [True, False])
def test_room_is_looked_for_before_anything_is_written(is_held, tmp_path, monkeypatch):
    given = {"w": torch.ones(2_000_000, dtype=torch.bfloat16)}
    taken = []

    def pairs():
        taken.append(1)
        yield from given.items()

    source = given if is_held else pairs()
    model = model_of(given, "BF16")
    monkeypatch.setattr("os.statvfs", lambda _: Space(10, 1, 1_500_000))
    match = r"need 0\.004 GB .* 0\.00[12] GB are free.*weights_dir"
    with pytest.raises(WeightUpdateError, match=match):
        sent(source, model, tmp_path / "new")
    assert not taken
    assert (tmp_path / "new" / "data").stat().st_size == 0
    monkeypatch.setattr("os.statvfs", lambda _: Space(0, 0, 4096))  # without a limit
    source = given if is_held else pairs()
    assert sent(source, model, tmp_path / "other").keys() == {"w"}


def test_a_disk_that_is_full_in_the_middle_is_said(tmp_path, monkeypatch):
    given = {"a": torch.ones(1000), "b": torch.ones(1000)}
    monkeypatch.setattr("os.pwrite", _full)
    with pytest.raises(WeightUpdateError, match=r"need 0\.00\d+ GB at .*weights_dir"):
        sent(iter(given.items()), model_of(given), tmp_path / "new")
    assert not (tmp_path / "new" / "index.json").exists()


def _full(*_):
    raise OSError(28, "No space left on device")


def test_room_for_wider_tensors_is_looked_for_with_the_first(tmp_path, monkeypatch):
    given = {name: torch.ones(1_000_000) for name in ("a", "b")}
    model = model_of(given, "BF16")  # a checkpoint in F32 may come in fewer bytes
    monkeypatch.setattr("os.statvfs", lambda _: Space(10, 1, 5_000_000))
    taken = []

    def pairs():
        for pair in given.items():
            taken.append(pair[0])
            yield pair

    with pytest.raises(WeightUpdateError, match=r"need 0\.008 GB .* 0\.005 GB are"):
        sent(pairs(), model, tmp_path / "new")
    assert taken == ["a"]
    assert (tmp_path / "new" / "data").stat().st_size == 0
    halves = ((name, t.bfloat16()) for name, t in given.items())
    assert sent(halves, model, tmp_path / "other").keys() == {"a", "b"}


def test_a_file_of_an_earlier_update_is_written_again_and_cut(tmp_path, monkeypatch):
    given = tensors()
    directory = tmp_path / "new"
    directory.mkdir()
    (directory / "data").write_bytes(b"x" * 100_000)
    number = (directory / "data").stat().st_ino
    monkeypatch.setattr("os.statvfs", lambda _: Space(10, 0, 4096))  # none but its own
    sending.send(given, model_of(given), directory)
    found = dict(map_tensors(read_index(str(directory / "index.json"))))
    assert {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in given.items()
    }
    assert (directory / "data").stat().st_ino == number
    assert (directory / "data").stat().st_size < 1000
