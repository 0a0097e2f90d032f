"""The pool's server sees no device, whatever the trainer sees."""

from __future__ import annotations

from aseer.kv.process import _ENV


def test_a_server_sees_no_device() -> None:
    assert _ENV["CUDA_VISIBLE_DEVICES"] == ""
    assert _ENV["HIP_VISIBLE_DEVICES"] == ""
