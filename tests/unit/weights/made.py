"""Sending to a directory that is made first, as an engine makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aseer.weights import sending
from aseer.weights.files import make_directory

if TYPE_CHECKING:
    from pathlib import Path

    from aseer.weights.checks import ModelSpec
    from aseer.weights.files import Index


def send(source: object, model: ModelSpec, directory: Path) -> Index:
    make_directory(directory)
    return sending.send(source, model, directory)


async def send_async(source: object, model: ModelSpec, directory: Path) -> Index:
    make_directory(directory)
    return await sending.send_async(source, model, directory)
