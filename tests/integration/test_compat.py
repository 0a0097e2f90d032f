"""aseer fits the vLLM and the LMCache that are installed."""

from __future__ import annotations

import time

import pytest

from aseer.compat.check import check, installed_roots

ROOTS = installed_roots()


@pytest.mark.parametrize("root", ROOTS, ids=[name for name, _, _ in ROOTS])
def test_names_and_facts_are_as_aseer_knows_them(root: tuple) -> None:
    started = time.process_time()
    report = check(*root)
    assert report.misfits == []
    assert report.num_names > 50
    assert time.process_time() - started < 5, "it is meant for every run of CI"
