"""Prompt files and the checks of answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from aseer.data import PromptFileError, PromptRecord, check_answer, load_prompts

if TYPE_CHECKING:
    from pathlib import Path

CHAT = [{"role": "user", "content": "Hi"}]


def write(path: Path, *lines: Any) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_the_default_prompts_are_64_chats_that_can_be_checked() -> None:
    records = load_prompts()
    assert len(records) == 64
    assert all(r.messages and r.answer and r.check for r in records)
    assert {r.check for r in records[:8]} == {"contains", "number"}
    assert len({r.messages[0]["content"] for r in records if r.messages}) == 64


def test_the_answers_of_the_default_prompts_pass_their_own_checks() -> None:
    for record in load_prompts():
        assert check_answer(record, f"Well, the answer is {record.answer}.")
        assert not check_answer(record, "I do not know.")


def test_a_prompt_may_be_a_chat_or_text_or_token_ids(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"messages": CHAT, "id": "chat", "answer": "hello"},
        "",
        {"prompt": "Once upon a time"},
        {"prompt_token_ids": [1, 2, 3], "answer": "7", "check": "number"},
        "",
    )
    assert load_prompts(path) == [
        PromptRecord(id="chat", messages=tuple(CHAT), answer="hello", check="contains"),
        PromptRecord(id="line-3", prompt="Once upon a time"),
        PromptRecord(
            id="line-4", prompt_token_ids=(1, 2, 3), answer="7", check="number"
        ),
    ]


def test_a_byte_order_mark_and_line_separators_in_strings_are_accepted(
    tmp_path: Path,
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}'.encode())
    assert [r.prompt for r in load_prompts(path)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, not list"),
        ({}, "exactly one of"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "exactly one of"),
        ({"prompt": "a", "reply": "b"}, r"unknown \['reply'\]"),
        ({"prompt": " "}, '"prompt" must be a string'),
        ({"prompt": "a", "id": 7}, '"id" must be a string'),
        ({"prompt": "a", "id": "first"}, "used on line 1 already"),
        ({"messages": []}, '"messages" must be a list'),
        ({"messages": [*CHAT, {"role": "user"}]}, r'"messages"\[1\] must be'),
        ({"messages": [{"role": "user", "content": 1}]}, r'"messages"\[0\] must be'),
        ({"prompt_token_ids": []}, '"prompt_token_ids" must be'),
        ({"prompt_token_ids": [1, -1]}, '"prompt_token_ids" must be'),
        ({"prompt_token_ids": [True]}, '"prompt_token_ids" must be'),
        ({"prompt": "a", "check": "number"}, '"check" without "answer"'),
        ({"prompt": "a", "answer": "b", "check": "exact"}, '"check" must be one of'),
        ({"prompt": "a", "answer": "b", "check": "number"}, '"answer" must be a'),
    ],
)
def test_a_bad_line_is_named_with_its_file(
    tmp_path: Path, line: Any, message: str
) -> None:
    path = write(tmp_path / "mine.jsonl", {"prompt": "ok", "id": "first"}, line)
    with pytest.raises(PromptFileError, match=rf"mine\.jsonl:2: .*{message}"):
        load_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="holds no prompt"):
        load_prompts(write(tmp_path / "p.jsonl", "", ""))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptFileError, match="not UTF-8"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("answer", "text", "is_right"),
    [
        ("Paris", "It is PARIS, of course.", True),
        ("Au", "because", False),
        ("no", "Not at all: nothing.", False),
        ("carbon dioxide", "It is carbon\n  dioxide.", True),
        ("% 2", "return n % 2 == 0", True),
        ("w x y z", "u v w x y z", True),
        ("H2O", "**H2O**", True),
        ("a.c", "abc", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_contains_looks_for_whole_words(answer: str, text: str, is_right: bool) -> None:
    record = PromptRecord(id="x", prompt="p", answer=answer, check="contains")
    assert check_answer(record, text) is is_right


@pytest.mark.parametrize(
    ("answer", "text", "is_right"),
    [
        ("8", "20 - 12 = 8.", True),
        ("8", "8, since 20 - 12 is that", False),
        ("8", "$8.00", True),
        ("1440", "24 x 60 = 1,440 minutes", True),
        ("3", "10-7=3", True),
        ("3", "that leaves 10-3", True),
        ("-3", "so x = -3", True),
        ("-3", "so x = \N{MINUS SIGN}3", True),
        ("3", "so x = -3", False),
        ("0.5", "which is .5", True),
        ("3", "f(2)-3", True),
        ("40", "40 m2", True),
        ("8", "eight", False),
    ],
)
def test_number_compares_the_last_number(
    answer: str, text: str, is_right: bool
) -> None:
    record = PromptRecord(id="x", prompt="p", answer=answer, check="number")
    assert check_answer(record, text) is is_right


def test_a_record_without_an_answer_cannot_be_checked() -> None:
    with pytest.raises(ValueError, match="no answer"):
        check_answer(PromptRecord(id="x", prompt="p"), "text")
