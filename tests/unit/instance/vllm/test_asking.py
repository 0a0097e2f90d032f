"""What vLLM is asked for a chunk and what its answers mean, with stand-ins for it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from aseer.sampling import SamplingParams as Ours
from aseer.types import ChunkEnd
from tests.unit.stand_ins import imported

MODULE = "aseer.instance.vllm.asking"
TEXT = {"stop", "include_stop_str_in_output"}  # settings that are not vLLM's to know


class Params:
    """vLLM's SamplingParams, of a release whose requests have intervals."""

    def __init__(self, *, stream_interval: int | None = None, **settings: Any) -> None:
        self.settings = settings | {"stream_interval": stream_interval}


class OlderParams:
    """The same before."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


@dataclass
class Text:
    """The text that was not told yet, since a stop string may have begun in it."""

    held: str

    def take(self, *, finished: bool) -> str:
        assert finished
        return self.held


def asking(monkeypatch: pytest.MonkeyPatch, params: type = Params) -> Any:
    names: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": params},
        "vllm.sampling_params": {
            "RequestOutputKind": SimpleNamespace(DELTA="delta"),
            "StructuredOutputsParams": lambda **fields: ("structured", fields),
        },
        "aseer.instance.vllm.text": {
            "SETTINGS": ("stop", "include_stop_str_in_output")
        },
    }
    return imported(monkeypatch, MODULE, names)


def asked(module: Any, **settings: Any) -> dict[str, Any]:
    chunk = SimpleNamespace(
        sampling=Ours(**settings).to_dict(), max_tokens=9, min_tokens=2, seed=7
    )
    found: dict[str, Any] = module.engine_params(chunk).settings
    return found


def test_a_chunk_has_its_own_lengths_and_seed_and_no_stop_strings(monkeypatch):
    module = asking(monkeypatch)
    found = asked(module, stop=["end"], max_tokens=99, seed=1, temperature=0.5)
    assert not TEXT & found.keys()
    assert (found["max_tokens"], found["min_tokens"], found["seed"]) == (9, 2, 7)
    assert (found["temperature"], found["structured_outputs"]) == (0.5, None)
    assert (found["detokenize"], found["output_kind"]) == (False, "delta")
    assert (found["logprobs"], found["flat_logprobs"]) == (0, True)


def test_lists_are_lists_and_structures_are_vllms(monkeypatch):
    module = asking(monkeypatch)
    found = asked(
        module,
        stop_token_ids=[1],
        allowed_token_ids=(1, 2),
        bad_words=["x"],
        structured_outputs={"regex": "a"},
    )
    lists = [found[n] for n in ("stop_token_ids", "allowed_token_ids", "bad_words")]
    assert lists == [[1], [1, 2], ["x"]]
    assert found["structured_outputs"] == ("structured", {"regex": "a"})
    assert asked(module)["allowed_token_ids"] is None


def test_each_token_is_told_where_one_may_end_a_stop_string(monkeypatch):
    module = asking(monkeypatch)
    assert asked(module, stop=["end"])["stream_interval"] == 1
    assert asked(module)["stream_interval"] == module.STREAM_INTERVAL > 1
    older = asking(monkeypatch, OlderParams)
    assert "stream_interval" not in asked(older, stop=["end"])


def test_the_sampled_tokens_logprob_is_the_first_of_its_row(monkeypatch):
    module = asking(monkeypatch)
    rows = SimpleNamespace(logprobs=[-1.0, -9.0, -2.0, -3.0], start_indices=[0, 2, 3])
    assert module.sampled_logprobs(rows, [5, 6, 7]) == [-1.0, -2.0, -3.0]
    assert module.sampled_logprobs(None, []) == []


def test_a_logprob_that_is_no_number_ends_the_chunk_with_its_token(monkeypatch):
    module = asking(monkeypatch)
    for bad in (float("nan"), float("-inf")):
        end = module.not_finite([5, 6, 7], [-1.0, bad, bad], Text("held"))
        assert (end.reason, end.held_text) == ("error", "held")
        assert f"sampled token 6 with the logprob {bad}:" in end.error
    assert module.not_finite([5], [bad], None).held_text == ""


@pytest.mark.parametrize(
    ("reason", "stop_reason", "end"),
    [
        ("stop", None, ChunkEnd(reason="stop", stop_reason=3)),  # its own end token
        ("stop", 8, ChunkEnd(reason="stop", stop_reason=8)),
        ("length", None, ChunkEnd(reason="length", held_text="held")),
        ("abort", None, ChunkEnd(reason="aborted", held_text="held")),
        (
            "error",
            None,
            ChunkEnd(
                reason="error", error="vLLM ended it with 'error'", held_text="held"
            ),
        ),
    ],
)
def test_an_end_says_why_and_what_text_was_held_back(
    monkeypatch, reason, stop_reason, end
):
    done = SimpleNamespace(
        finish_reason=reason, stop_reason=stop_reason, token_ids=array("i", [1, 2, 3])
    )
    assert asking(monkeypatch).end_of(done, Text("held")) == end
