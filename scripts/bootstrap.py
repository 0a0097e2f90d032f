"""Make .venv what the demo and the tests need; do nothing, at once, if it already is.

    python3 scripts/bootstrap.py [--v2] [--images]

With --v2, .venv-v2 as well: a folder with Triton, by which an engine runs the model
runner of GPUs on this CPU (tests/e2e/v2/README.md). With --images, .venv-images: a
folder with torchvision, which models that see need.

Run with any Python 3; uses the standard library only. Packages come from whatever
index pip is configured with, in the versions of requirements/cpu.lock. That torch is a
CPU build is checked, never assumed.

Invariants: what is done is written down (`Stamp`) only once it is done, so an
interrupted set-up is completed by the next run; two runs at once take turns.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "aseer-setup.json"
LOG = VENV / "aseer-setup.log"
LOCK = ROOT / "requirements" / "cpu.lock"
V2 = ROOT / ".venv-v2"
V2_STAMP = V2 / "aseer-setup.json"
IMAGES = ROOT / ".venv-images"
IMAGES_STAMP = IMAGES / "aseer-setup.json"

TORCH = "2.13.0"
# What torch's builds of that version for GPUs ask for.
TRITON = "3.8.0"
TORCHVISION = "0.28.0"  # for that torch
UV = "0.13.9"
OLDEST, NEWEST = (3, 11), (3, 13)
# What requirements/cpu.lock was made for and tested on.
PLATFORM = ("Linux", "x86_64")
QUIET_S = 10.0

_started = time.monotonic()


class SetupError(Exception):
    """Why the environment cannot be made, and what to do about it."""


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", flush=True)


def run(command: list[str], *, progress: str = "", total: int = 0) -> tuple[int, str]:
    """Run a command; its output goes to the log. Returns its exit status and output.

    Every `QUIET_S` seconds one line says how many of `total` packages have been found
    (`progress` names the step), then how many are installed. However this function is
    left, the command has ended.
    """
    lines: list[str] = []
    rest = b""
    next_word = time.monotonic() + QUIET_S
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        try:
            while True:
                if select.select([pipe], [], [], 1.0)[0]:
                    data = os.read(pipe, 65536)
                    if not data:
                        break
                    log.write(data)
                    *whole, rest = (rest + data).split(b"\n")
                    lines += [line.decode(errors="replace") for line in whole]
                if progress and time.monotonic() >= next_word:
                    next_word = time.monotonic() + QUIET_S
                    say(f"  {progress}: {_how_far(lines, total)}")
            lines.append(rest.decode(errors="replace"))
            return process.wait(), "\n".join(lines)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            process.stdout.close()


def _how_far(lines: list[str], total: int) -> str:
    """What pip's output, and what it has put in place, say about its progress."""
    if any(line.startswith("Installing collected") for line in lines):
        num_installed = len(list(site_packages().glob("*.dist-info/RECORD")))
        return f"putting in place; {num_installed} packages are there"
    starts = ("Collecting ", "Processing ", "Requirement already")
    return f"{sum(line.startswith(starts) for line in lines)} of {total} fetched"


def pip(*arguments: str, progress: str = "", total: int = 0) -> tuple[int, str]:
    """Run the environment's pip; see `run`."""
    command = [str(VENV_PYTHON), "-m", "pip", "--no-input", *arguments]
    return run(command, progress=progress, total=total)


def must(result: tuple[int, str], what: str) -> None:
    """Raise SetupError, with the end of the output, if a command failed."""
    status, output = result
    if status != 0:
        tail = "\n".join("    " + line for line in output.strip().splitlines()[-15:])
        raise SetupError(f"{what} failed:\n{tail}\n  everything it said: {LOG}")


def site_packages() -> Path:
    """The environment's folder of packages."""
    return next((VENV / "lib").glob("python3.*")) / "site-packages"


# -- what is wanted, and what is there -------------------------------------------------


def wanted() -> dict[str, str]:
    """Hashes of everything that the packages, and the built module, depend on."""
    packages = hashlib.sha256(f"{ROOT} {sys.version_info[:2]} {TORCH}\n".encode())
    packages.update(LOCK.read_bytes())
    build = hashlib.sha256(packages.digest())
    for path in [
        ROOT / "pyproject.toml",
        ROOT / "CMakeLists.txt",
        *sorted((ROOT / "aseer").glob("**/csrc/*")),
    ]:
        build.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return {"packages": packages.hexdigest(), "build": build.hexdigest()}


def stamped() -> dict[str, str]:
    """What the last finished set-up had made; empty if there was none."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and VENV_PYTHON.exists() else {}


def venv_is_usable() -> bool:
    """Whether .venv was made here, for this Python, and can run pip."""
    try:
        settings = (VENV / "pyvenv.cfg").read_text()
    except OSError:
        return False
    made_as = re.search(r"^command = .* (\S+)$", settings, re.MULTILINE)
    if made_as and Path(made_as[1]).resolve() != VENV:
        return False
    look = "import sys, pip; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run(
            [str(VENV_PYTHON), "-c", look], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return False
    version = tuple(map(int, answer.stdout.split()))
    return version == sys.version_info[:2]


def torch_build() -> str | None:
    """The version of torch that is installed, with its build; None if none is."""
    for info in site_packages().glob("torch-*.dist-info"):
        return info.name.removeprefix("torch-").removesuffix(".dist-info")
    return None


# -- the steps -------------------------------------------------------------------------


def use_fitting_python() -> None:
    """Go on under a Python that can be used, if this one cannot; else return.

    Raises:
        SetupError: there is none.
    """
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        other = shutil.which(f"python3.{minor}")
        # A version manager's stand-in is found even if it has nothing to start.
        if other and subprocess.run([other, "-c", ""], capture_output=True).returncode:
            other = None
        if other:
            say(f"this is Python {platform.python_version()}; going on with {other}")
            os.execv(other, [other, __file__, *sys.argv[1:]])
    raise SetupError(
        f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed, and this is "
        f"{platform.python_version()}. Install one, or name it: make PYTHON=python3.12"
    )


def check_machine() -> None:
    """Raise SetupError if something that no package brings is missing."""
    here = (platform.system(), platform.machine())
    if here != PLATFORM:
        raise SetupError(
            f"this set-up is for {' on '.join(PLATFORM)}, the platform that the pinned "
            f"vLLM for CPUs and the rest of {LOCK.name} were tested on; "
            f"this is {' on '.join(here)}. On a machine with GPUs: "
            "pip install vllm, then pip install -e '.[models,plot]'"
        )
    named = os.environ.get("CXX", "").split()[:1]
    if not any(map(shutil.which, named or ("c++", "g++", "clang++"))):
        raise SetupError(
            "no C++ compiler is found, which the native module needs. Install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise SetupError(
            f"the headers of Python {platform.python_version()} (Python.h) are "
            "missing. Install them (Debian, Ubuntu: apt install python3-dev; "
            "Fedora: dnf install python3-devel)"
        )
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        raise SetupError(
            "this Python cannot make virtual environments (Debian, Ubuntu: "
            "apt install python3-venv)"
        ) from None


def make_venv() -> None:
    """Make .venv, unless there is one that can be used.

    Raises:
        SetupError: what is there cannot be used, and is not ours to delete.
    """
    if venv_is_usable():
        return
    if LOG.exists():
        say(f"removing {VENV.name}: unfinished, moved here, or of another Python")
        # Out of the way first: half removed, it would look like somebody else's.
        old = ROOT / "build" / "old-venv"
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(exist_ok=True)
        VENV.rename(old)
        shutil.rmtree(old)
    if VENV.exists():
        raise SetupError(
            f"{VENV} is there, was not made by this set-up, and cannot be used by it "
            f"(it wants Python {platform.python_version()} and pip). Move it away"
        )
    say(f"making {VENV.name} with Python {platform.python_version()}")
    VENV.mkdir()
    must(run([sys.executable, "-m", "venv", str(VENV)]), "making the environment")


def drop_half_installed() -> None:
    """Have pip install again what an interrupted run had not finished installing.

    pip writes a package's RECORD last, but takes one without it for installed.
    """
    for info in site_packages().glob("*.dist-info"):
        if not (info / "RECORD").is_file():
            shutil.rmtree(info)


def install_torch() -> None:
    """Install the CPU build of torch, from pip's index or else from PyTorch's own.

    Raises:
        SetupError: neither has it, or what came is another build.
    """
    cpu = f"{TORCH}+cpu"
    if torch_build() == cpu:
        return
    say(f"installing torch {cpu}")
    # The local version is named, so that pip cannot take a CUDA build for it.
    first = pip("install", "--no-deps", f"torch=={cpu}", progress="torch", total=1)
    if first[0] != 0:
        say("  pip finds none; asking uv, which knows PyTorch's index of CPU builds")
        must(pip("install", f"uv=={UV}"), "installing uv")
        uv = [str(VENV_PYTHON), "-m", "uv", "pip", "install"]
        where = ["--python", str(VENV_PYTHON), "--no-deps", "--torch-backend", "cpu"]
        must(run([*uv, *where, f"torch=={TORCH}"]), "installing the CPU build of torch")
    if torch_build() != cpu:
        raise SetupError(f"torch {torch_build()} was installed, and {cpu} is needed")


def install_packages() -> None:
    """Install the lock, and nothing that is not in it."""
    total = sum("==" in line for line in LOCK.read_text().splitlines())
    say(f"installing the {total} packages of {LOCK.relative_to(ROOT)}")
    arguments = ["install", "--no-deps", "--progress-bar", "off", "-r", str(LOCK)]
    must(pip(*arguments, progress="packages", total=total), "installing the packages")


def build_aseer() -> None:
    """Build the native module; install aseer with its Python files left in place."""
    say("building the native module and installing aseer")
    arguments = ["install", "--no-deps", "--no-build-isolation", "--editable", "."]
    must(pip(*arguments), "building aseer")
    look = "import aseer, aseer.core._native, aseer.dgds._cst"
    must(run([str(VENV_PYTHON), "-c", look]), "importing the native module")


def set_up() -> None:
    """Bring the environment up to date, step by step, saying what is done."""
    use_fitting_python()
    want = wanted()
    if stamped() == want:
        return
    check_machine()
    make_venv()
    if stamped().get("packages") != want["packages"]:
        STAMP.unlink(missing_ok=True)
        drop_half_installed()
        install_torch()
        install_packages()
    STAMP.write_text(json.dumps({"packages": want["packages"]}))
    build_aseer()
    STAMP.write_text(json.dumps(want))
    say(f"{VENV.name} is ready")


def set_up_v2() -> None:
    """Put Triton into a folder of its own, which only tests of V2 look into.

    In .venv it would change what vLLM does on a CPU.
    """
    want = json.dumps({"triton": TRITON, "python": sys.version_info[:2]})
    if V2_STAMP.is_file() and V2_STAMP.read_text() == want:
        return
    shutil.rmtree(V2, ignore_errors=True)
    say(f"putting Triton {TRITON} into {V2.name}; it takes 1 GB")
    arguments = ["install", "--no-deps", "--no-compile", "--progress-bar", "off"]
    must(pip(*arguments, "--target", str(V2), f"triton=={TRITON}"), "installing Triton")
    V2_STAMP.write_text(want)
    say(f"{V2.name} is ready")


_NO_OPERATORS = """

# By scripts/bootstrap.py: this build's operators are for CUDA. The rest can be imported
# once those are declared that it says more of.
if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(
            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
"""


def set_up_images() -> None:
    """Put torchvision into a folder of its own, which only tests of images look into.

    In .venv every process of every engine would import it, which takes seconds. It is
    the CPU build from where torch came from, or PyPI's, which is for CUDA: its image
    processing is all Python, and its operators, which do not load beside a torch for
    CPUs, are for other models.
    """
    want = json.dumps({"torchvision": TORCHVISION, "python": sys.version_info[:2]})
    if IMAGES_STAMP.is_file() and IMAGES_STAMP.read_text() == want:
        return
    shutil.rmtree(IMAGES, ignore_errors=True)
    say(f"putting torchvision {TORCHVISION} into {IMAGES.name}")
    arguments = ["install", "--no-deps", "--no-compile", "--progress-bar", "off"]
    arguments += ["--target", str(IMAGES)]
    if pip(*arguments, f"torchvision=={TORCHVISION}+cpu")[0] != 0:
        must(pip(*arguments, f"torchvision=={TORCHVISION}"), "installing torchvision")
        with (IMAGES / "torchvision" / "extension.py").open("a") as file:
            file.write(_NO_OPERATORS)
    IMAGES_STAMP.write_text(want)
    say(f"{IMAGES.name} is ready")


def main() -> int:
    """Set up under a lock, so that a second run waits for the first."""
    if set(sys.argv[1:]) - {"--v2", "--images"}:
        print(f"usage: {sys.argv[0]} [--v2] [--images]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running; waiting for it")
            fcntl.flock(folder, fcntl.LOCK_EX)
        set_up()
        if "--v2" in sys.argv[1:]:
            set_up_v2()
        if "--images" in sys.argv[1:]:
            set_up_images()
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted; the next run completes it", file=sys.stderr)
        return 130
    finally:
        os.close(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
