"""The native code under AddressSanitizer and UBSan: no error in random work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROUNDS = 60
pytestmark = pytest.mark.timeout(240)


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    # vLLM on a CPU preloads libraries in processes to come; sanitizers must be first.
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def cmake() -> str:
    """The environment's, or the machine's."""
    own = Path(sys.executable).with_name("cmake")
    found = str(own) if own.exists() else shutil.which("cmake")
    if found is None:
        pytest.skip("cmake is not installed")
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs."""
    folder = tmp_path_factory.mktemp("stress")
    program = cmake()
    (folder / "probe.cc").write_text("int main() {}")
    sanitized = ("-fsanitize=address,undefined", "probe.cc", "-o", "probe")
    if run("c++", *sanitized, folder=folder).returncode:
        pytest.skip("the compiler has no sanitizers")
    configure = (program, "-S", ROOT, "-B", folder, "-DASEER_SANITIZE=ON")
    for command in (configure, (program, "--build", folder, "-j", "2")):
        done = run(*command, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("program", ["cst_stress", "core_stress", "log_stress"])
def test_random_work_finds_no_fault(program: str, built: Path) -> None:
    done = run(built / program, str(ROUNDS), folder=built)
    assert done.returncode == 0, done.stderr
    assert f"{ROUNDS} rounds passed" in done.stdout
