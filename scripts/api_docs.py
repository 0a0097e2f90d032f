"""Writes docs/api.md from the docstrings of every public name.

Run it after changing one: `.venv/bin/python scripts/api_docs.py`. A unit test compares.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import aseer
import aseer.display
import aseer.integrations.processes
import aseer.integrations.trl
import aseer.plot

if TYPE_CHECKING:
    from collections.abc import Callable

TARGET = Path(__file__).resolve().parent.parent / "docs" / "api.md"
SECTIONS = {
    "Engine and rollout": [
        "Engine",
        "EngineConfig",
        "KvPoolConfig",
        "SpeculationConfig",
        "rollout",
        "Rollout",
        "SyncRollout",
        "Desk",
        "WeightTarget",
    ],
    "What goes in": ["Group", "SamplingParams"],
    "What comes out": [
        "Response",
        "RequestMetrics",
        "RolloutReport",
        "WeightUpdateReport",
        "InstanceReport",
        "Progress",
        "report.SpeculationReport",
        "report.KvReport",
        "report.Completion",
        "report.TimelineSample",
        "types.InstanceInfo",
        "types.KvGroup",
    ],
    "Beside the package": [
        "display.Live",
        "plot.timeline",
        "plot.completions",
        "integrations.trl.rollout_func",
        "integrations.processes.Processes",
    ],
}
# Names that signatures use for longer types, by the module that defines them.
ALIASES = {
    "Groups": "groups",
    "Message": "inputs/tokenizer",
    "PolicyName": "config",
    "KvPoolMode": "inputs/kv_pool",
    "KvTransfer": "inputs/kv_pool",
    "SpeculationMethod": "inputs/speculation",
    "BudgetPolicy": "inputs/speculation",
    "Pause": "runtime/weights",
    "Transfer": "inputs/calls",
    "WeightSource": "weights/sending",
    "FinishReason": "types",
    "InstanceId": "types",
    "HasProgress": "display",
    "Console": "display",
}
# What no type says.
IN_WORDS = {
    "WeightSource": "see `Engine.update_weights`",
    "InstanceId": "an int: 0 for the first instance",
    "Console": "`rich.console.Console`",
    "HasProgress": "what has a `progress()`, such as a `Rollout` or a `SyncRollout`",
}
# Made by the engine: what their constructors take is nobody's business.
NOT_MADE_BY_USERS = ("Rollout", "SyncRollout", "Desk", "WeightTarget")
HEAD = """# API reference

Every public name of `aseer`, and of its modules what is of use to you. Token ids are
ints, logprobs are natural logarithms held as float32, times are seconds. What is
awaited has `await` before it. What is not listed here may change without notice.
"""


def render() -> str:
    """The whole page."""
    parts = []
    sections = dict(SECTIONS)
    listed = {name for names in sections.values() for name in names}
    public = [n for n in aseer.__all__ if n not in listed and n != "__version__"]
    errors = [n for n in public if issubclass(getattr(aseer, n), BaseException)]
    sections["Other"] = [n for n in public if n not in errors]
    for title, names in sections.items():
        if names:
            parts.append(f"## {title}\n")
            parts += [_render_name(name) for name in names]
    parts.append("## Errors\n")
    parts.append(_code(inspect.getdoc(aseer.errors) or ""))
    for name in errors:
        parts.append(f"- `{name}`: {_first_line(getattr(aseer, name))}")
    parts.append(_aliases())
    body = "\n".join(parts).rstrip() + "\n"
    return f"{HEAD}\n{_contents(body)}\n{body}"


def _contents(body: str) -> str:
    """Links to sections and their names, by the anchors that GitHub makes."""
    lines: list[str] = []
    seen: Counter[str] = Counter()
    for marks, title in re.findall(r"^(##+) (.+)$", body, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        seen[anchor] += 1
        if seen[anchor] > 1:
            anchor += f"-{seen[anchor] - 1}"
        if marks == "##":
            lines.append(f"- [{title}](#{anchor})")
        elif marks == "###":
            separator = ": " if lines[-1].count("](") == 1 else ", "
            lines[-1] += f"{separator}[{title}](#{anchor})"
    return "\n".join(lines) + "\n"


def _aliases() -> str:
    """The types that signatures only name."""
    lines = ["\n## Types\n"]
    for name, module in ALIASES.items():
        words = IN_WORDS.get(name) or f"`{_definition(module, name)}`"
        lines.append(f"- `{name}`: {words}")
    return "\n".join(lines)


def _definition(module: str, name: str) -> str:
    """The right side of a module's `name = ...`."""
    path = Path(aseer.__file__).parent / f"{module}.py"
    for node in ast.parse(path.read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return ast.unparse(node.value)  # type: ignore[attr-defined]
    raise LookupError(f"{path} defines no {name}")


def _render_name(name: str) -> str:
    thing = attrgetter(name)(aseer)
    parts = [f"### `{name}`\n"]
    if isinstance(thing, type) and dataclasses.is_dataclass(thing):
        parts.append(_code(_fields(name, thing), "python"))
    elif inspect.isfunction(thing):
        parts.append(_code(f"aseer.{name}{_signature(thing)}", "python"))
    elif name not in NOT_MADE_BY_USERS:
        parts.append(_code(f"aseer.{name}{_signature(thing.__init__)}", "python"))
    parts.append(_code(inspect.getdoc(thing) or ""))
    if inspect.isclass(thing):
        parts += _members(thing)
    return "\n".join(parts)


def _members(thing: type) -> list[str]:
    parts = []
    for name, member in inspect.getmembers_static(thing):
        if name.startswith("_") or (
            dataclasses.is_dataclass(thing)
            and name in {f.name for f in dataclasses.fields(thing)}
        ):
            continue
        doc = inspect.getdoc(member)
        if not doc:
            continue
        if isinstance(member, property):
            parts.append(f"#### `{thing.__name__}.{name}`\n\n{_code(doc)}")
        elif inspect.isfunction(member):
            head = f"{thing.__name__}.{name}{_signature(member)}"
            if inspect.iscoroutinefunction(member):
                head = f"await {head}"
            parts.append(f"#### `{thing.__name__}.{name}()`\n")
            parts.append(_code(head, "python"))
            parts.append(_code(doc))
    return parts


def _fields(name: str, thing: type) -> str:
    lines = [f"aseer.{name}("]
    for field in dataclasses.fields(thing):
        default = ""
        if field.default is not dataclasses.MISSING:
            default = f" = {field.default!r}"
        elif field.default_factory is not dataclasses.MISSING:
            default = f" = {getattr(field.default_factory, '__name__', '...')}()"
        lines.append(f"    {field.name}: {_given(str(field.type))}{default},")
    return "\n".join([*lines, ")"])


def _given(annotation: str) -> str:
    """The type that a field takes, without what else its annotation says of it."""
    node = ast.parse(annotation, mode="eval").body
    while isinstance(node, ast.Subscript) and (
        ast.unparse(node.value) in ("Annotated", "Resolved")
    ):
        node = node.slice.elts[0]  # type: ignore[attr-defined]
        if ast.unparse(node) == "AnyPath":
            return _given(_definition("inputs/settings", "AnyPath"))
    return ast.unparse(node)


def _signature(function: Callable[..., object]) -> str:
    text = str(inspect.signature(function))
    text = re.sub(r"\(self(, )?", "(", text)
    return text.replace("'", "").removesuffix(" -> None")


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(render())
