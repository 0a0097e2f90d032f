"""Keep what `python -m aseer.compat` says of releases in `bench/results/compat.md`.

    python scripts/compat_page.py [VERSION|NAME==VERSION|FOLDER...]

Without arguments it is all releases that aseer takes, whose wheels pip fetches (2.4
GB). Only Python files are read: no GPU is needed, and nothing is installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from aseer.compat.check import Report, check
from aseer.compat.versions import (
    LMCACHE,
    LMCACHE_TORCH,
    RELEASES,
    lmcache_obstacle,
    release_of,
)
from aseer.compat.wheels import named_roots, torch_of

# The last of each that aseer takes, and the one LMCache that goes with them.
WHEELS = (
    *("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"),
    f"lmcache=={LMCACHE}",
)
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "bench" / "results" / "compat.md"
HEAD = """# aseer against the source of vLLM and LMCache

`{command}`, at {commit}: every name of theirs that aseer uses
is looked up in the Python files of the releases' wheels for GPUs, and every behaviour
that aseer takes for granted (a *fact*) is compared with the source line that is known
of that release. Nothing was run.

| release | built for torch | names | facts | what does not fit | KV pool on GPUs |
|---|---|---|---|---|---|
"""


def main(wanted: list[str]) -> int:
    """Write the page; 1 if something does not fit."""
    rows, texts = [], []
    with tempfile.TemporaryDirectory(prefix="aseer-compat-") as scratch:
        roots = named_roots(wanted or WHEELS, Path(scratch))
        for package, version, root in roots:
            report = check(package, version, root)
            torch = torch_of(root, package)
            rows.append(_row(report, torch))
            texts += _misfits(report, torch)
    shown = "make compat" if not wanted else f"scripts/compat_page.py {len(wanted)} ..."
    page = HEAD.format(command=shown, commit=_commit()) + "\n".join(rows) + "\n"
    page += "".join(f"\n{text}\n" for text in texts)
    PAGE.write_text(page)
    sys.stdout.write(page)
    return 1 if texts else 0


def _row(report: Report, torch: str | None) -> str:
    serves = ""
    if report.package == "vllm":
        serves = f"with LMCache {LMCACHE}"
        if lmcache_obstacle(LMCACHE, torch, on_gpu=True) is not None:
            wanted = " or ".join(".".join(map(str, torch)) for torch in LMCACHE_TORCH)
            serves = f"no: LMCache {LMCACHE} was built for torch {wanted}"
    cells = (
        f"{report.package} {report.version}",
        torch or "any",
        report.num_names,
        report.num_facts,
        f"{len(report.misfits)}, below" if report.misfits else "nothing",
        serves,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _misfits(report: Report, torch: str | None) -> list[str]:
    texts = [f"{report.package} {report.version}: {text}" for text in report.misfits]
    known = {r.vllm: r.torch for r in RELEASES}
    if report.package == "vllm" and torch is not None:
        major, minor, *_ = release_of(report.version)
        if known.get((major, minor)) != release_of(torch)[:2]:
            texts.append(
                f"vllm {report.version}: `RELEASES` knows no torch {torch} of it"
            )
    return texts


def _commit() -> str:
    """The one that is checked out; "-dirty" if what is looked up differs from it."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "aseer")
    return (head or "an unknown commit") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
