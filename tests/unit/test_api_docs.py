"""The API reference is what the docstrings say, and names everything public."""

from __future__ import annotations

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
