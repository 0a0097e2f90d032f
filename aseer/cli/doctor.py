"""`aseer doctor`: whether a rollout has what it needs here, and what to do if not."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from aseer.cli.checks import all_checks
from aseer.cli.findings import Finding
from aseer.cli.first_hour import all_steps, run_steps, write_report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from aseer.cli.findings import Check

    MakeChecks = Callable[..., Sequence[Check]]

_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add `doctor` and its options."""
    parser = subparsers.add_parser(
        "doctor",
        parents=[common],
        help="check the installation, and say what to do",
        description="Check this installation; the exit code is 1 if a check fails.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--no-engine", action="store_true", help="do not start an engine (quicker)"
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a model's directory or name: also say what aseer does for its family, "
        "and whether its weights have room",
    )
    parser.add_argument(
        "--gpu",
        metavar="DIR",
        type=Path,
        help="go through a new machine's first hour, up to the first failure, and "
        "write first-hour.json and first-hour.md there",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the findings as JSON on stdout, and nothing else",
    )


def run(args: argparse.Namespace, *, make_checks: MakeChecks = all_checks) -> int:
    """Check everything and return the exit code."""
    console = Console(quiet=args.json, highlight=False)
    if args.gpu is not None:
        return _first_hour(args.gpu, console)
    with tempfile.TemporaryDirectory(prefix="aseer-doctor-") as scratch:
        checks = make_checks(
            Path(scratch), with_engine=not args.no_engine, model=args.model
        )
        findings = examine(checks, console)
    ok = all(f.status != "fail" for f in findings.values())
    if args.json:
        data = {name: asdict(finding) for name, finding in findings.items()}
        sys.stdout.write(json.dumps({"ok": ok, "checks": data}, indent=1) + "\n")
    verdict = "aseer can run here" if ok else "mend what failed, then try again"
    console.print(verdict, style="bold")
    return 0 if ok else 1


def _first_hour(folder: Path, console: Console) -> int:
    with tempfile.TemporaryDirectory(prefix="aseer-doctor-") as scratch:
        outcomes = run_steps(
            all_steps(Path(scratch)), lambda o: _print(console, o.name, o.finding)
        )
    _, page = write_report(outcomes, folder)
    console.print(f"written: {page}", style="bold")
    return int(any(o.finding.status == "fail" for o in outcomes))


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
        _print(console, check.name, finding)
    return findings


def _print(console: Console, name: str, finding: Finding) -> None:
    color = _COLORS[finding.status]
    line = Text.assemble((f"{finding.status:<4}", color), (f"  {name}", "bold"))
    console.print(line.append(f": {finding.detail}", "default"), soft_wrap=True)
    if finding.advice:
        console.print(Text(f"      -> {finding.advice}", color), soft_wrap=True)
