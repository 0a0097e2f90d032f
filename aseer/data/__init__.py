"""Prompts with checkable answers: a small set that comes with aseer, or a user's file.

A prompt file is JSON Lines, UTF-8. Each line is an object with one of
    "messages"          a chat: [{"role": "user", "content": "..."}, ...]
    "prompt"            text, given to the model as it is
    "prompt_token_ids"  token ids
and may have
    "id"      a name, unique in the file; "line-<number>" if left out
    "answer"  what a right response must say
    "check"   how that is decided: "contains" (the default) or "number"
A file is checked whole when it is loaded, so that a slip on its last line shows before
anything runs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from aseer.errors import AseerError

Check = Literal["contains", "number"]

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")

_CONTENT_KEYS = ("messages", "prompt", "prompt_token_ids")
_KNOWN_KEYS = (*_CONTENT_KEYS, "id", "answer", "check")
_CHECKS = ("contains", "number")

# A minus sign after a word, a number or a bracket is a subtraction or a hyphen.
_NUMBER = re.compile(
    r"(?:(?<![\w)])-)?(?<!\w)(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)"
)


class PromptFileError(AseerError, ValueError):
    """A prompt file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """One prompt, in one of three forms, and what a right response must say.

    Attributes:
        id: unique in its file.
        messages: a chat, each with a role and a content; None if another form is given.
        prompt: text without a chat template; None if another form is given.
        prompt_token_ids: None if another form is given.
        answer: None: responses cannot be checked.
        check: how the answer is looked for; None without an answer.
    """

    id: str
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    answer: str | None = None
    check: Check | None = None


def load_prompts(path: Path | None = None) -> list[PromptRecord]:
    """Read a prompt file; blank lines are skipped.

    Args:
        path: None: the 64 questions that come with aseer. The first 8 are a mix of all.

    Raises:
        PromptFileError: a line that is not as this module's docstring says, an id that
            occurs twice, or no prompt at all.
        OSError: the file cannot be read.
    """
    path = path or DEFAULT_PROMPTS
    records: list[PromptRecord] = []
    line_of_id: dict[str, int] = {}
    # Split at line feeds only: JSON strings may hold other line separators as they are.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _parse_line(line, default_id=f"line-{number}")
            if record.id in line_of_id:
                first = line_of_id[record.id]
                raise ValueError(f"id {record.id!r} was used on line {first} already")
        except ValueError as exc:
            raise PromptFileError(f"{path}:{number}: {exc}") from exc
        line_of_id[record.id] = number
        records.append(record)
    if not records:
        raise PromptFileError(f"{path}: holds no prompt")
    return records


def check_answer(record: PromptRecord, text: str) -> bool:
    """Whether a response is right.

    "contains": the answer stands in the text, whatever the case and the spacing, and
    not as a part of a longer word. "number": the last number of the text is the answer.

    Raises:
        ValueError: the record has no answer.
    """
    if record.answer is None:
        raise ValueError(f"prompt {record.id!r} has no answer to check against")
    if record.check == "number":
        numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
        return bool(numbers) and _to_decimal(numbers[-1]) == _to_decimal(record.answer)
    words = [re.escape(word) for word in record.answer.casefold().split()]
    # Not \b, which would ask for a word character where an answer ends in a sign.
    pattern = r"(?<!\w)" if record.answer.strip()[0].isalnum() else ""
    pattern += r"\s+".join(words)
    pattern += r"(?!\w)" if record.answer.strip()[-1].isalnum() else ""
    return re.search(pattern, text.casefold()) is not None


def _read_text(path: Path) -> str:
    try:
        # Some editors put a byte order mark at the front.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise PromptFileError(f"{path}: not UTF-8 ({exc})") from exc


def _parse_line(line: str, *, default_id: str) -> PromptRecord:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as exc:
        raise ValueError(f"not JSON: {exc.msg} at column {exc.colno}") from exc
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, not {type(fields).__name__}")
    unknown = sorted(fields.keys() - set(_KNOWN_KEYS))
    if unknown:
        raise ValueError(f"unknown {unknown}; known are {list(_KNOWN_KEYS)}")
    given = [key for key in _CONTENT_KEYS if key in fields]
    if len(given) != 1:
        raise ValueError(f"needs exactly one of {list(_CONTENT_KEYS)}, has {given}")
    answer, check = _parse_answer(fields)
    return PromptRecord(
        id=_parse_text(fields, "id") if "id" in fields else default_id,
        messages=_parse_messages(fields) if "messages" in fields else None,
        prompt=_parse_text(fields, "prompt") if "prompt" in fields else None,
        prompt_token_ids=(
            _parse_token_ids(fields) if "prompt_token_ids" in fields else None
        ),
        answer=answer,
        check=check,
    )


def _parse_text(fields: dict[str, Any], key: str) -> str:
    text = fields[key]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{key}" must be a string that is not empty, not {text!r}')
    return text


def _parse_messages(fields: dict[str, Any]) -> tuple[dict[str, str], ...]:
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list that is not empty')
    for place, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or not all(isinstance(value, str) for value in message.values())
        ):
            raise ValueError(
                f'"messages"[{place}] must be {{"role": text, "content": text}}, '
                f"not {message!r}"
            )
    return tuple(messages)


def _parse_token_ids(fields: dict[str, Any]) -> tuple[int, ...]:
    token_ids = fields["prompt_token_ids"]
    # JSON's true is an int to Python.
    if (
        not isinstance(token_ids, list)
        or not token_ids
        or not all(type(token_id) is int and token_id >= 0 for token_id in token_ids)
    ):
        raise ValueError(
            '"prompt_token_ids" must be a list, not empty, of numbers from 0 on'
        )
    return tuple(token_ids)


def _parse_answer(fields: dict[str, Any]) -> tuple[str | None, Check | None]:
    if "answer" not in fields:
        if "check" in fields:
            raise ValueError('"check" without "answer"')
        return None, None
    answer = _parse_text(fields, "answer")
    check: Check = fields.get("check", "contains")
    if check not in _CHECKS:
        raise ValueError(f'"check" must be one of {list(_CHECKS)}, not {check!r}')
    if check == "number" and _to_decimal(answer) is None:
        raise ValueError(f'"answer" must be a number for this check, not {answer!r}')
    return answer, check


def _to_decimal(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
