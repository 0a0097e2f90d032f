"""`aseer doctor`: whether a rollout has what it needs here, and what to do if not."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from aseer.cli.checks import all_checks
from aseer.cli.examining import examine, show
from aseer.cli.hour.plan import all_steps, site_here
from aseer.cli.hour.report import DATA, PAGE, kept_steps, places_of, write_report
from aseer.cli.hour.site import DEFAULT_MODEL
from aseer.cli.hour.steps import before, choose, is_ok, run_steps
from aseer.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from aseer.cli.findings import Check
    from aseer.cli.hour.steps import Outcome

    MakeChecks = Callable[..., Sequence[Check]]


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
        "and whether its weights have room; with --gpu, the model of its larger steps "
        f"(default there: {DEFAULT_MODEL}, on a CPU a tiny one)",
    )
    parser.add_argument(
        "--gpu",
        metavar="DIR",
        type=Path,
        help="go through a new machine's first hour, up to the first failure, and "
        "write first-hour.json and first-hour.md there",
    )
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="NAME", help="with --gpu: these only"
    )
    parser.add_argument(
        "--from",
        dest="first",
        metavar="NAME",
        help="with --gpu: begin with this step, and keep what DIR has of earlier ones",
    )
    parser.add_argument(
        "--list-steps", action="store_true", help="say what the steps of --gpu are"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the findings as JSON on stdout, and nothing else",
    )


def run(args: argparse.Namespace, *, make_checks: MakeChecks = all_checks) -> int:
    """Check everything and return the exit code."""
    console = Console(quiet=args.json, highlight=False)
    if args.list_steps:
        return _list_steps(args)
    if args.gpu is not None:
        return _first_hour(args, console)
    if args.steps or args.first is not None:
        raise ConfigError("--steps and --from choose of --gpu DIR; give that, too")
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


def _list_steps(args: argparse.Namespace) -> int:
    nowhere = Path()
    for each in all_steps(site_here(nowhere, nowhere, args.model)):
        why = f" (skipped here: {each.skip})" if each.skip else ""
        sys.stdout.write(f"{each.name}: {each.about}{why}\n")
    return 0


def _first_hour(args: argparse.Namespace, console: Console) -> int:
    folder: Path = args.gpu.resolve()
    with tempfile.TemporaryDirectory(prefix="aseer-doctor-") as made:
        scratch = Path(made)
        steps = all_steps(site_here(scratch, folder, args.model))
        chosen = choose(steps, args.steps, args.first)
        kept = kept_steps(folder, before(steps, args.first))
        places = places_of(scratch=scratch, report=folder)
        found: list[Outcome] = []

        def tell(outcome: Outcome) -> None:
            found.append(outcome)
            _write(found, folder, places, kept)
            show(console, outcome.name, outcome.finding)

        with _logging_to(folder / "logs"):
            run_steps(
                chosen, tell, lambda each: console.status(f"{each.name}: {each.about}")
            )
    if args.json:
        sys.stdout.write((folder / DATA).read_text("utf-8"))
    console.print(f"written: {folder / PAGE}", style="bold", soft_wrap=True)
    return 0 if is_ok(found) else 1


@contextmanager
def _logging_to(folder: Path) -> Iterator[None]:
    """Keep what aseer logs in a file: engines that are killed are no news here."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "aseer.log", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("aseer")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def _write(
    found: Sequence[Outcome],
    folder: Path,
    places: Mapping[str, str],
    kept: Sequence[Mapping[str, Any]],
) -> None:
    try:
        write_report(found, folder, places, kept)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}") from error
