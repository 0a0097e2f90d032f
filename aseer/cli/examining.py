"""Checks run in order, and findings shown as they come."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.text import Text

from aseer.cli.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from aseer.cli.findings import Check

_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def examine(checks: Sequence[Check], console: Console) -> dict[str, Finding]:
    """Run the checks in order, and show each finding as it comes."""
    findings: dict[str, Finding] = {}
    for check in checks:
        missing = [n for n in check.needs if findings[n].status in ("fail", "skip")]
        if missing:
            finding = Finding(status="skip", detail=f"needs {', '.join(missing)}")
        else:
            start = time.monotonic()
            with console.status(f"checking {check.name}"):
                finding = check.run()
            finding = finding.after(time.monotonic() - start)
        findings[check.name] = finding
        show(console, check.name, finding)
    return findings


def show(console: Console, name: str, finding: Finding) -> None:
    """A finding is a line, and its advice another."""
    color = _COLORS[finding.status]
    line = Text.assemble((f"{finding.status:<4}", color), (f"  {name}", "bold"))
    console.print(line.append(f": {finding.detail}", "default"), soft_wrap=True)
    if finding.advice:
        console.print(Text(f"      -> {finding.advice}", color), soft_wrap=True)
