"""The API reference is what the docstrings say, and names everything public."""

from __future__ import annotations

import re

import aseer
from scripts import api_docs


def test_the_reference_is_up_to_date():
    assert api_docs.TARGET.read_text() == api_docs.render(), (
        "run .venv/bin/python scripts/api_docs.py"
    )


def test_the_reference_has_every_public_name():
    text = api_docs.TARGET.read_text()
    for name in aseer.__all__:
        assert name == "__version__" or f"`{name}`" in text


def test_every_type_that_a_signature_names_is_there():
    text = api_docs.TARGET.read_text()
    code = "".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    code = re.sub(r"'[^']*'", "", code)
    named = set(re.findall(r"(?<![\w.])[A-Z]\w*[a-z]\w*", code))
    standard = {"Any", "None", "True", "False", "Callable", "Iterable", "Iterator"}
    standard |= {"AsyncIterator", "Mapping", "Sequence", "Literal", "Path"}
    known = set(re.findall(r"`(?:\w+\.)*(\w+)`", text))
    assert named - standard - known == set()
