"""Each patch is still needed: without it the other package does what the patch mends.

When a release mends it, the test of the patch fails, and the patch is to go. Those of
the reload of weights need an engine: `tests/e2e/test_patches.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from aseer.instance.vllm import patches as vllm_patches
from aseer.kv import patches as lmcache_patches

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(180)


def answer(module: str, *args: str) -> object:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.integration.{module}", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LMCACHE_TRACK_USAGE": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@cache
def vllm_faults() -> dict[str, list[bool]]:
    return answer("vllm_faults")


@pytest.mark.parametrize(
    "name", [p.name for p in vllm_patches.PATCHES if p.moment != "reload"]
)
def test_a_patch_of_vllm_is_applied_where_its_fault_is_and_mends_it(name: str) -> None:
    pytest.importorskip("vllm")
    is_faulty, is_patched, is_faulty_still = vllm_faults()[name]
    assert is_patched == is_faulty, "as it is here, vLLM has nothing to be mended"
    assert not is_faulty_still


def test_patches_of_vllm_are_needed_by_the_newest_release_that_was_run() -> None:
    pytest.importorskip("vllm")
    found = vllm_faults().items()
    needless = [name for name, (is_faulty, *_) in found if not is_faulty]
    assert needless == [
        "keep_schedule",  # for the next release
        "keep_masks_apart",  # for older ones
    ]


@pytest.mark.parametrize("how", ["without", "with"])
def test_patches_of_lmcache_mend_what_is_wrong_without_them(
    how: str, tmp_path: Path
) -> None:
    pytest.importorskip("lmcache")
    found = answer("lmcache_faults", how, str(tmp_path), f"aseer-test-{os.getpid()}")
    names = [patch.name for patch in lmcache_patches.PATCHES]
    assert found == dict.fromkeys(names, how == "without")
