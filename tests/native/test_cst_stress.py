"""The native tree under AddressSanitizer and UBSan: no error in random work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROUNDS = 60
pytestmark = pytest.mark.timeout(240)


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False
    )


def cmake() -> str:
    """The environment's, or the machine's."""
    own = Path(sys.executable).with_name("cmake")
    found = str(own) if own.exists() else shutil.which("cmake")
    if found is None:
        pytest.skip("cmake is not installed")
    return found


def test_random_work_on_a_forest_finds_no_fault(tmp_path: Path) -> None:
    program = cmake()
    (tmp_path / "probe.cc").write_text("int main() {}")
    sanitized = ("-fsanitize=address,undefined", "probe.cc", "-o", "probe")
    if run("c++", *sanitized, folder=tmp_path).returncode:
        pytest.skip("the compiler has no sanitizers")
    configure = (program, "-S", ROOT, "-B", tmp_path, "-DASEER_SANITIZE=ON")
    for command in (configure, (program, "--build", tmp_path, "-j", "2")):
        built = run(*command, folder=tmp_path)
        assert built.returncode == 0, built.stdout + built.stderr
    done = run(tmp_path / "cst_stress", str(ROUNDS), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{ROUNDS} rounds passed" in done.stdout
