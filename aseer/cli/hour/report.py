"""What was found, written for programs and for readers, and fit to be sent.

Files are written anew after each step, so that whatever ends the list leaves them.
Places of this machine (paths, its name) are taken out: they help nobody else.
"""

from __future__ import annotations

import json
import platform
import re
import socket
import sys
import tempfile
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aseer.compat.versions import installed_packages
from aseer.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aseer.cli.hour.steps import Outcome

DATA, PAGE = "first-hour.json", "first-hour.md"


def write_report(
    outcomes: Sequence[Outcome],
    folder: Path,
    places: Mapping[str, str],
    kept: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write what was found so far; gives the page's path.

    Args:
        places: what to write instead of places of this machine (`places_of`).
        kept: earlier steps that a report had there (`kept_steps`).
    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = without_places(data_of(outcomes, kept), places)
    (folder / DATA).write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    page = folder / PAGE
    page.write_text(page_of(data), "utf-8")
    return page


def kept_steps(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Steps of these names in the report that is there, by the same packages.

    A run that goes on where another ended has one report with it. What other packages
    were found to do says nothing of these.
    """
    try:
        data = json.loads((folder / DATA).read_text("utf-8"))
        found = [each for each in data["steps"] if each["name"] in names]
        same = all(data[key] == value for key, value in _packages().items())
    except (OSError, ValueError, KeyError, TypeError):  # none, or no report of ours
        return []
    return found if same else []


def data_of(
    outcomes: Sequence[Outcome], kept: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The report as plain data."""
    steps = [
        *map(dict, kept),
        *(
            {"name": name, **asdict(finding), "figures": _plain(figures)}
            for name, finding, figures in outcomes
        ),
    ]
    return {
        "ok": all(each["status"] != "fail" for each in steps),
        **_packages(),
        "seconds": round(sum(each["seconds"] for each in steps), 1),
        "steps": steps,
    }


def _packages() -> dict[str, Any]:
    return {
        "aseer": __version__,
        "python": platform.python_version(),
        "packages": installed_packages(),
    }


def _plain(figures: Any) -> Any:
    if isinstance(figures, list):
        return [_plain(each) for each in figures]
    if is_dataclass(figures) and not isinstance(figures, type):
        return asdict(figures)
    return figures


def page_of(data: Mapping[str, Any]) -> str:
    """The same for a reader."""
    packages = ", ".join(f"{name} {v}" for name, v in data["packages"].items())
    lines = [
        "# First hour",
        "",
        f"aseer {data['aseer']}, Python {data['python']}, {packages}. "
        f"{'Nothing failed' if data['ok'] else 'A step failed'}; "
        f"{data['seconds']:.0f} s in all.",
        "",
        "| step | | s | found |",
        "|---|---|---|---|",
    ]
    for each in data["steps"]:
        text = ". ".join(filter(None, (each["detail"], each["advice"])))
        text = " ".join(text.split()).replace("|", "\\|")
        seconds = f"{each['seconds']:.1f}"
        lines.append(f"| {each['name']} | {each['status']} | {seconds} | {text} |")
    for each in data["steps"]:
        if each["figures"]:
            figures = json.dumps(each["figures"], indent=1)
            lines += ["", f"## {each['name']}", "", "```json", figures, "```"]
    return "\n".join(lines) + "\n"


def places_of(**named: Path) -> dict[str, str]:
    """Places of this machine, and what stands for them in a report.

    Args:
        named: further ones, by the word that stands for each.
    """
    found = {str(path): f"<{name}>" for name, path in named.items()}
    found |= {str(path.resolve()): f"<{name}>" for name, path in named.items()}
    found |= {sys.prefix: "<environment>", tempfile.gettempdir(): "<tmp>"}
    found |= {str(Path.cwd()): "<here>", str(Path.home()): "~"}
    found[socket.gethostname()] = "<host>"
    return {place: word for place, word in found.items() if len(place) > 1}


def without_places(data: Any, places: Mapping[str, str]) -> Any:
    """The same plain data, in whose texts words stand for places."""
    if isinstance(data, str):
        # The longest first: it may lie within another. A host may be called "a".
        for place in sorted(places, key=len, reverse=True):
            whole = rf"(?<![\w.-]){re.escape(place)}(?![\w-])"
            data = re.sub(whole, partial(_word, places[place]), data)
        return data
    if isinstance(data, dict):
        return {key: without_places(value, places) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_places(value, places) for value in data]
    return data


def _word(word: str, _: re.Match[str]) -> str:
    return word
