"""Build the wheel, and test what is in it rather than what is in the checkout.

    python scripts/check_wheel.py [--python PYTHON ...] [PYTEST ARGUMENTS ...]

The wheel is installed into an environment of its own, which finds all other packages in
.venv. There a program that uses the public names is checked by `mypy --strict`
(`tests/typing`), and unit and property tests run on a copy of the checkout whose
`aseer` is the installed one. They measure coverage, too, unless arguments choose other
tests, and fail below the threshold in `pyproject.toml`. For each further Python that is
named a wheel is built for it and tested in the same way, but for coverage, with
packages from pip's index; one that is not at hand is skipped, and the output says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTED = ("tests/typing", "tests/unit", "tests/property")
# Two processes share the tests, as in `make test`.
SHARED = ("-n", "2", "--no-loadscope-reorder")
# It looks for the sources of the native modules, which are not in the wheel.
OF_THE_CHECKOUT = "tests/unit/test_architecture.py"
# What is no part of the copy; `aseer` is the installed one.
LEFT_OUT = ("aseer", "build", "dist", "runs", ".*", "__pycache__")


def main() -> int:
    """Test the wheel of each Python; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="a further interpreter, such as python3.13; may be given several times",
    )
    args, for_pytest = parser.parse_known_args()
    failed = []
    for python in (sys.executable, *args.python):
        found = shutil.which(python)
        version = version_of(found) if found else ""
        if found is None or not version:
            say(f"SKIPPED {python}: it is not on this machine, or does not run")
        elif python != sys.executable and version == version_of():
            say(f"SKIPPED {python}: it is of the version that .venv has")
        elif not check(Path(found), for_pytest):
            failed.append(python)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def version_of(python: str = sys.executable) -> str:
    """Such as "3.11"; empty if it does not run, as a shim of pyenv's may not."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


def check(python: Path, for_pytest: list[str]) -> bool:
    """Build and test a wheel for one Python; returns whether all of it passes."""
    is_ours = python == Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix="aseer-wheel-") as name:
        folder = Path(name)
        say(f"building the wheel for {python}")
        wheel = build(python, folder / "wheels", is_ours)
        say(f"testing {wheel.name}")
        tested = install(python, wheel, folder / "env", is_ours)
        tree = copy_tree(folder / "tree", tested)
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        options = ["-p", "no:cacheprovider", f"--ignore={OF_THE_CHECKOUT}", *SHARED]
        if is_ours and not for_pytest:  # others lack packages, and skip their tests
            options += ["--cov", "--cov-report=term"]
        tests = for_pytest or TESTED
        command = [str(tested), "-m", "pytest", *options, *tests]
        return subprocess.run(command, cwd=tree, env=environment).returncode == 0


def build(python: Path, folder: Path, is_ours: bool) -> Path:
    """A wheel of the checkout; .venv has what its own build needs."""
    options = [
        *(["--no-build-isolation"] if is_ours else []),
        "--config-settings=build-dir=build/wheel-{wheel_tag}",
        f"--wheel-dir={folder}",
    ]
    command = [str(python), "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, *options, str(ROOT)], check=True)
    (wheel,) = folder.glob("aseer-*.whl")
    return wheel


def install(python: Path, wheel: Path, folder: Path, is_ours: bool) -> Path:
    """An environment with the wheel; returns its interpreter."""
    subprocess.run([str(python), "-m", "venv", str(folder)], check=True)
    tested = folder / "bin" / "python"
    pip = [str(tested), "-m", "pip", "install", "--quiet"]
    if is_ours:
        # Behind its own packages. The .pth files of .venv are not read from there, so
        # that the checkout, which .venv has installed, is not found.
        paths = folder / f"lib/python{version_of()}/site-packages/venv.pth"
        paths.write_text(sysconfig.get_path("platlib") + "\n")
        subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    else:
        subprocess.run([*pip, f"{wheel}[models,test]", "mypy>=1.18"], check=True)
    return tested


def copy_tree(tree: Path, tested: Path) -> Path:
    """A copy of the checkout, with the installed package in place of its `aseer`."""
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    where = "import aseer, pathlib; print(pathlib.Path(aseer.__file__).parent)"
    done = subprocess.run(
        [str(tested), "-c", where], cwd=tree, check=True, capture_output=True, text=True
    )
    package = Path(done.stdout.strip())
    if not package.is_relative_to(tested.parent.parent):
        raise SystemExit(f"{tested} finds {package}, which is not the wheel's")
    (tree / "aseer").symlink_to(package)
    return tree


def say(text: str) -> None:
    """Print a line at once."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
