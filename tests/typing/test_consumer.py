"""Types of the public names, as `mypy --strict` sees them in somebody else's program.

From the wheel (`make test-wheel`) this also shows that aseer is a typed package there;
in a checkout mypy is told where aseer is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Their types are not worth a minute of checking.
SETTINGS = """
[mypy]
pretty = false
[mypy-lmcache.*,matplotlib.*,numpy.*,rich.*,torch.*,transformers.*,vllm.*,zmq.*]
follow_imports = skip
ignore_missing_imports = true
"""
FOLDER = Path(__file__).parent
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """What mypy says of each file, by line."""
    pytest.importorskip("mypy")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    where = "import aseer; print(aseer.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    package = Path(done.stdout.strip()).parent
    is_installed = package.parent.name == "site-packages"
    path = {} if is_installed else {"MYPYPATH": str(package.parent)}
    settings = elsewhere / "mypy.ini"
    settings.write_text(SETTINGS)
    files = [FOLDER / "consumer.py", FOLDER / "misuse.py"]
    options = ["--strict", "--follow-imports=silent", "--config-file", str(settings)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *map(str, files)],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | path,
    )
    assert done.returncode in (0, 1), done.stderr
    assert not re.search("py.typed|import-untyped|import-not-found", done.stdout)
    found: dict[str, dict[int, str]] = {file.name: {} for file in files}
    for line in done.stdout.splitlines():
        match = re.match(r"(?:.*/)?(\w+\.py):(\d+): error: (.*)", line)
        if match is not None:
            found[match[1]][int(match[2])] = match[3]
    return found


def test_a_program_of_the_public_names_has_the_types_that_its_author_expects(
    errors: dict[str, dict[int, str]],
) -> None:
    assert errors["consumer.py"] == {}


def test_wrong_uses_are_refused_line_by_line(
    errors: dict[str, dict[int, str]],
) -> None:
    lines = (FOLDER / "misuse.py").read_text().splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if "# wrong" in line]
    assert sorted(errors["misuse.py"]) == wrong
