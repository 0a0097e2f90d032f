"""Engines that run on the interpreter of an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from typing import TYPE_CHECKING

import psutil
import pytest

import aseer
from aseer.node.interpreter import interpreter_at, this_interpreter
from tests.integration.sims import config_of, content, groups_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Another environment's interpreter, which has what this one has."""
    folder = tmp_path_factory.mktemp("environment")
    create = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(create, check=True)
    packages = next((folder / "lib").glob("python3.*")) / "site-packages"
    here = sysconfig.get_paths()["purelib"]
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return folder / "bin" / "python"


async def test_instances_run_there_and_make_the_same_responses(environment):
    groups = groups_of(4)
    async with aseer.Engine(config_of()) as engine:
        expected = content([r async for r in engine.rollout(groups)])
    async with aseer.Engine(config_of(python=environment)) as engine:
        for info in engine.instances:
            assert psutil.Process(info.pid).cmdline()[0] == str(environment)
        assert content([r async for r in engine.rollout(groups)]) == expected


def test_its_packages_are_asked_of_it_and_nothing_points_it_here(
    environment, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    found = interpreter_at(str(environment))
    assert not found.is_ours
    assert found.packages == this_interpreter().packages
    assert "PYTHONPATH" not in found.environment()
    assert found.command("m", "a") == (str(environment), "-P", "-m", "m", "a")


def test_what_cannot_run_or_lacks_aseer_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(aseer.ConfigError, match=r"cannot be run.*such as /opt"):
        aseer.Engine(config_of(python=tmp_path / "nothing"))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} -S -I "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(aseer.ConfigError, match=r"does not have aseer's.*pip install"):
        aseer.Engine(config_of(python=bare))
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\necho \'{"aseer": "0.0.1", "protocol": 1}\'\n')
    old.chmod(0o755)
    with pytest.raises(
        aseer.ConfigError, match=r"has aseer 0\.0\.1 .*the same in both"
    ):
        aseer.Engine(config_of(python=old))
