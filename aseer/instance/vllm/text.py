"""A response's text and stop strings, over the chunks that generate it.

vLLM's own incremental detokenizer does the work, primed with the prompt and with what
earlier chunks generated, so that it sees the response and not the chunk.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream
from vllm.v1.engine.detokenizer import (
    FastIncrementalDetokenizer,
    IncrementalDetokenizer,
)

if TYPE_CHECKING:
    from aseer.types import Chunk

SETTINGS = (
    "stop",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
# What decoders write for bytes that are no character, or not a whole one yet.
_REPLACEMENT = "\ufffd"
# A character has at most four bytes, each a token of its own at worst; between them and
# the prompt's end there may be special tokens, which are not written.
_TAIL = 32


class Text:
    """The text of one chunk's response, from its first token on."""

    def __init__(self, chunk: Chunk, tokenizer: Any) -> None:
        """Prepare for the chunk's tokens; `tokenizer` is vLLM's."""
        settings = {k: chunk.sampling[k] for k in SETTINGS}
        settings["stop"] = list(settings["stop"])
        self._has_stops = bool(settings["stop"])
        prompt = array("i", chunk.prompt).tolist()
        generated = array("i", chunk.generated).tolist()
        # It counts earlier chunks' tokens too, and must not look for stops among them.
        settings["min_tokens"] = len(generated) + chunk.min_tokens
        request = SimpleNamespace(
            request_id=chunk.request_id,
            prompt_token_ids=prompt,
            prompt_embeds=None,
            sampling_params=SimpleNamespace(**settings),
        )
        self._decoder = IncrementalDetokenizer.from_new_request(tokenizer, request)
        if isinstance(self._decoder, FastIncrementalDetokenizer):
            _begin_behind(prompt, self._decoder)
        if generated:
            self._decoder.update(generated, stop_terminated=False)
            self.take(finished=False)  # earlier chunks delivered it

    def add(self, tokens: list[int], stopped: bool) -> tuple[int, str | None]:
        """Decode new tokens; returns how many count, and the stop string they
        complete.
        """
        if not self._has_stops:
            self._decoder.update(tokens, stopped)
            return len(tokens), None
        # One by one, since of several at once releases before 0.32 count those behind
        # the stop string, too.
        for num, token in enumerate(tokens, 1):
            hit = self._decoder.update([token], stopped and num == len(tokens))
            if hit is not None:
                return num, hit
        return len(tokens), None

    def take(self, finished: bool) -> str:
        """Text since the last call, less what might begin a stop string."""
        return str(self._decoder.get_next_output_text(finished, delta=True))


def _begin_behind(prompt: list[int], decoder: Any) -> None:
    """Have the text begin behind a prompt that ends within a character.

    vLLM's detokenizer (its `DecodeStream`) takes the prompt for what is written already
    only if its text does not end with a replacement character. Otherwise the text of
    the response would begin with the whole prompt, and stop strings match in it. Here
    it begins with the character that the prompt has only a part of, if the response
    completes it.
    """

    def decoded(tokens: list[int]) -> str:
        skip = decoder.skip_special_tokens
        return str(decoder.tokenizer.decode(tokens, skip_special_tokens=skip))

    end = decoded(prompt[-_TAIL:]) or decoded(prompt)
    if not end.endswith(_REPLACEMENT):
        return
    decoder.stream = DecodeStream(skip_special_tokens=decoder.skip_special_tokens)
    tail = prompt[-_TAIL:]
    num_written = 0
    for i, token in enumerate(tail, 1):
        if decoder.decode_next(token):
            num_written = i
    unfinished = decoded(tail[num_written:])
    decode_next = decoder.decode_next

    def decode_first(token: int) -> str:
        text = str(decode_next(token))
        if text:
            decoder.decode_next = decode_next
            for character in unfinished:
                if not text.startswith(character):
                    break
                text = text[1:]
        return text

    decoder.decode_next = decode_first
