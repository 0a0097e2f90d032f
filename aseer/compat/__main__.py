"""`python -m aseer.compat [DIR...]`: the exit code is 1 if something does not fit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aseer.compat.check import (
    CompatError,
    check,
    installed_roots,
    unpacked_roots,
)


def main(arguments: list[str] | None = None) -> int:
    """Check what is named, or what is installed, and print what does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m aseer.compat",
        description="Check aseer against the source of vLLM and LMCache. To check a "
        "release that is not installed: `pip download --no-deps vllm==X.Y.Z`, unzip "
        "the wheel into a folder, and name the folder.",
    )
    parser.add_argument("folder", nargs="*", type=Path, help="an unpacked wheel")
    folders = parser.parse_args(arguments).folder
    try:
        roots = [root for f in folders for root in unpacked_roots(f)]
    except CompatError as error:
        parser.error(str(error))
    if not folders:
        roots = installed_roots()
        if not roots:
            parser.error("neither vllm nor lmcache is installed; name folders")
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
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
