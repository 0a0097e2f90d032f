"""The documentation's code, taken out of its pages and run as it stands.

What a page takes for granted (an engine's model, a reward) comes as names; each block
may use what earlier blocks of its page have defined.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_of(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return _BLOCK.findall((ROOT / page).read_text())


def compiled(block: str) -> Any:
    """A block's code, which may wait, as a program of its own may not.

    Raises:
        SyntaxError: it is not Python.
    """
    return compile(block, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


async def run(block: str, names: dict[str, Any]) -> None:
    """Run a block as if its page were one program."""
    waits = eval(compiled(block), names)
    if inspect.isawaitable(waits):
        await waits


async def run_readme(names: dict[str, Any]) -> None:
    """The README's rollout and update."""
    (block,) = blocks_of("README.md")
    await run(block, names)


async def run_first_program(names: dict[str, Any]) -> None:
    """The quick start's first block, which is a whole program."""
    first = blocks_of("docs/quickstart.md")[0]
    await run(first.partition("\n\nif __name__")[0], names)
    await names["main"]()


async def run_other_blocks(names: dict[str, Any]) -> None:
    """The quick start's other blocks, on one engine by the settings in `names`."""
    aseer, config = names["aseer"], names["config"]
    blocks = blocks_of("docs/quickstart.md")
    _, fields, whole, refill, single, plain, update, mooncake = blocks
    async with aseer.Engine(config) as engine:
        names["engine"] = engine
        async with engine.rollout(names["groups"][:1]) as rollout:
            responses = [r async for r in rollout]
        names["response"] = responses[0]
        await run(fields, names)
        await run(whole, names)
        assert len(names["rewards"]) == 8
        await run(refill, names)
        assert len(names["batch"]) == 64
        await run(single, names)
        assert len(names["scores"]) == 8
        await run(update, names)
        assert engine.weight_version == 1
    await run(plain, names)
    await run(mooncake, names)
