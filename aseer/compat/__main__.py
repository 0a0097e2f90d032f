"""`python -m aseer.compat [VERSION|DIR...]`: exit code 1 if something does not fit."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from aseer.compat.check import CompatError, check, installed_roots
from aseer.compat.wheels import named_roots


def main(arguments: list[str] | None = None) -> int:
    """Check what is named, or what is installed, and print what does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m aseer.compat",
        description="Check aseer against the source of vLLM and LMCache, as they are "
        "installed, of an unpacked wheel, or of a release that pip fetches for this.",
    )
    parser.add_argument(
        "what",
        nargs="*",
        help="a folder, a version of vLLM such as 0.33.0, or NAME==VERSION",
    )
    wanted = parser.parse_args(arguments).what
    with tempfile.TemporaryDirectory(prefix="aseer-compat-") as scratch:
        try:
            roots = named_roots(wanted, Path(scratch))
        except CompatError as error:
            parser.error(str(error))
        if not wanted:
            roots = installed_roots()
            if not roots:
                parser.error("neither vllm nor lmcache is installed; name versions")
        return 0 if _report(roots) else 1


def _report(roots: list[tuple[str, str, Path]]) -> bool:
    """Print what does not fit; whether everything does."""
    fits = True
    for package, version, root in roots:
        report = check(package, version, root)
        verdict = f"{len(report.misfits)} do not fit" if report.misfits else "all fit"
        sys.stdout.write(
            f"{package} {version}: {report.num_names} names and {report.num_facts} "
            f"facts, {verdict}\n"
        )
        for misfit in report.misfits:
            sys.stdout.write(f"  {misfit}\n")
        fits = fits and not report.misfits
    return fits


if __name__ == "__main__":
    sys.exit(main())
