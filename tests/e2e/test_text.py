"""A response's text is what it adds to its prompt's, by vLLM's real detokenizer."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from aseer.instance.vllm.text import Text
from aseer.sampling import SamplingParams
from aseer.types import Chunk, ChunkId, GroupId, InstanceId, RequestId

SPECIAL = 256
EURO = "€".encode()
FAMILY = "👪".encode()
UNKNOWN = "\ufffd".encode()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token a byte, of that number."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain}
    letters |= {b: chr(256 + i) for i, b in enumerate(others)}
    vocabulary = {letters[b]: b for b in range(256)} | {"<s>": SPECIAL}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def chunk_of(prompt: list[int], generated: list[int], **settings: Any) -> Chunk:
    return Chunk(
        chunk_id=ChunkId(0),
        request_id=RequestId("g/0"),
        group_id=GroupId("g"),
        instance_id=InstanceId(0),
        prompt=array("i", prompt).tobytes(),
        generated=array("i", generated).tobytes(),
        max_tokens=100,
        min_tokens=settings.get("min_tokens", 0),
        sampling=SamplingParams(**settings).to_dict(),
        seed=None,
        num_reserved_blocks=1,
    )


def text_of(
    tokenizer: Any, prompt: list[int], *chunks: bytes, **settings: Any
) -> tuple[str, str | None]:
    """The whole text of a response that is generated in chunks, and the stop string."""
    parts: list[str] = []
    generated: list[int] = []
    hit = None
    for tokens in chunks:
        text = Text(chunk_of(prompt, generated, **settings), tokenizer)
        for token in tokens:
            _, hit = text.add([token], stopped=False)
            if hit is not None:
                break
        generated += tokens
        parts.append(text.take(finished=hit is not None))
    parts.append(text.take(finished=True))
    return "".join(parts), hit


@pytest.mark.parametrize(
    ("prompt", "response", "text"),
    [
        ([*b"Hello "], b"ab", "ab"),
        ([*b"Hello ", *EURO], b"ab", "ab"),
        # The response completes the character.
        ([*b"Hello ", *EURO[:1]], EURO[1:] + b"ab", "€ab"),
        ([*b"Hello ", *EURO[:2]], EURO[2:] + b"ab", "€ab"),
        ([*b"Hello ", *FAMILY[:3]], FAMILY[3:] + b"ab", "👪ab"),
        ([*EURO[:1]], EURO[1:] + b"ab", "€ab"),
        # It does not, or there is nothing to complete.
        ([*b"Hello ", *EURO[:2]], b"ab", "ab"),
        ([*b"Hello ", *EURO[:2]], EURO + b"b", "€b"),
        ([*b"Hello ", 0xFF], b"ab", "ab"),
        ([*b"Hello ", 0xFF], b"\xffa", "\ufffda"),
        ([*b"Hello ", 0xFF, *EURO[:2]], EURO[2:] + b"a", "€a"),
        ([*b"Hello ", *UNKNOWN], b"ab", "ab"),
        ([0xFF] * 100, b"ab", "ab"),
        # Special tokens are not written.
        ([*b"Hello ", *EURO[:2], SPECIAL], b"ab", "ab"),
        ([*b"Hello ", *EURO[:2], *[SPECIAL] * 50], b"ab", "ab"),
        ([SPECIAL] * 3, b"ab", "ab"),
    ],
)
def test_text_begins_behind_the_prompt(tokenizer, prompt, response, text):
    assert text_of(tokenizer, prompt, response) == (text, None)
    for at in range(1, len(response)):
        parts = (response[:at], response[at:])
        assert text_of(tokenizer, prompt, *parts) == (text, None)


def test_stop_strings_do_not_match_in_the_prompt(tokenizer):
    prompt = [*b"END", *EURO[:2]]
    found = text_of(tokenizer, prompt, b"ab", b"cEND", stop=["END"])
    assert found == ("abc", "END")


@pytest.mark.parametrize("several", [1, 2, 3, 16])
@pytest.mark.parametrize(
    ("settings", "num", "text"),
    [
        ({}, 5, "ab"),
        ({"include_stop_str_in_output": True}, 5, "abEND"),
        ({"min_tokens": 5}, 10, "abENDcd"),
    ],
    ids=["cut", "kept", "min_tokens"],
)
def test_tokens_end_with_a_stop_string_however_many_come_at_once(
    tokenizer, several, settings, num, text
):
    """As they do with drafts, or where the engine streams a few tokens at a time."""
    response = list(b"abENDcdENDef")
    chunk = chunk_of(list(b"Hello"), [], stop=["no", "END"], **settings)
    written = Text(chunk, tokenizer)
    num_kept, hit = 0, None
    while hit is None:
        tokens = response[num_kept : num_kept + several]
        kept, hit = written.add(tokens, stopped=False)
        num_kept += kept
    assert (num_kept, hit) == (num, "END")
    assert written.take(finished=True) == text
