"""Scripts that start nodes by a launcher are whole, and start what they say."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import aseer
from aseer.cli.main import main
from tests.integration.nodes import KEY, Nodes, nodes_in
from tests.integration.sims import content, groups_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)

# Stand-ins for a launcher's command, which run what they are told at once, and here.
SSH = """\
[ "$1" = -tt ] && shift
echo "$1" >>"$HOME/hosts"
shift
exec sh -c "$*"
"""
SRUN = """\
while [ "${1#--}" != "$1" ]; do
    case "$1" in --nodes=*) nodes=${1#--nodes=} ;; esac
    shift
done
echo "${nodes:-all}: $* [$ASEER_CONTROLLER_FILE]" >>"$SLURM_SUBMIT_DIR/started"
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_in(tmp_path) as nodes:
        yield nodes


def printed(capsys: pytest.CaptureFixture[str], launcher: str, *options: str) -> str:
    assert main(["node", "--print", launcher, *options]) == 0
    return capsys.readouterr().out


def with_command(folder: Path, name: str, script: str) -> dict[str, str]:
    """An environment in which a command is that script."""
    (folder / name).write_text("#!/bin/sh\n" + script)
    (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(folder)}


@pytest.mark.parametrize("launcher", ["slurm", "ssh"])
@pytest.mark.parametrize("options", [(), ("--log-dir", "a b'c", "--gpus", "0,1")])
def test_a_script_is_one_that_bash_reads(capsys, launcher, options):
    script = printed(capsys, launcher, *options)
    assert script.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_options_are_quoted_for_the_shell(capsys):
    script = printed(capsys, "slurm", "--log-dir", "a b", "--lifetime", "60")
    assert "--log-dir 'a b' --lifetime 60.0" in script


def test_a_name_is_for_one_node_alone(capsys):
    assert main(["node", "--print", "ssh", "--name", "one"]) == 1
    assert "--name names one node" in capsys.readouterr().err


def test_the_manifest_for_kubernetes_is_whole(capsys):
    yaml = pytest.importorskip("yaml")
    service, deployment = yaml.safe_load_all(printed(capsys, "k8s", "--gpus", "0,1"))
    (port,) = service["spec"]["ports"]
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    (container,) = pod["spec"]["containers"]
    where = f"tcp://{service['metadata']['name']}:{port['port']}"
    command = ["aseer", "node", "--gpus", "0,1", "--controller", where]
    assert container["command"] == command
    (key,) = container["env"]
    assert key["name"] == "ASEER_KEY"
    assert "secretKeyRef" in key["valueFrom"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["spec"]["volumes"]
    assert (mount["mountPath"], mount["name"]) == ("/dev/shm", volume["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    assert pod["spec"]["terminationGracePeriodSeconds"] > 20


def test_a_controller_that_is_named_needs_no_service(capsys):
    yaml = pytest.importorskip("yaml")
    script = printed(capsys, "k8s", "--controller", "tcp://head:5557")
    (deployment,) = yaml.safe_load_all(script)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"][-2:] == ["--controller", "tcp://head:5557"]


@pytest.mark.parametrize(
    ("trainer", "started"),
    [
        ([], ["all: aseer node --lifetime 4"]),
        (["python", "t.py"], ["1: python t.py", "3: aseer node --gpus 0"]),
    ],
)
def test_slurm_runs_nodes_on_all_hosts_or_the_trainer_on_the_first(
    capsys, tmp_path, trainer, started
):
    script = tmp_path / "nodes.sh"
    script.write_text(printed(capsys, "slurm", "--gpus", "0"))
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_END_TIME": str(int(time.time()) + 4200),
    }
    env = with_command(tmp_path, "srun", SRUN) | slurm
    subprocess.run(["bash", str(script), *trainer], env=env, check=True)
    lines = sorted((tmp_path / "started").read_text().splitlines())
    for line, begin in zip(lines, started, strict=True):
        assert line.startswith(begin)
        assert line.endswith(f"[{tmp_path}/aseer-17.json]")


def test_nodes_that_ssh_starts_join_with_the_key_that_it_brought(
    capsys, nodes, tmp_path
):
    script = tmp_path / "nodes.sh"
    logs = tmp_path / "it's logs"
    options = ("--num-instances", "1", "--log-dir", str(logs))
    script.write_text(printed(capsys, "ssh", *options))
    env = with_command(tmp_path, "ssh", SSH)
    env |= {"ASEER_KEY_FILE": str(nodes.key_file()), "ASEER_CONTROLLER": nodes.address}
    running = subprocess.Popen(
        ["bash", str(script), "one", "two"], env=env, stderr=subprocess.PIPE
    )
    try:
        with aseer.Engine(nodes.config(min_nodes=2)) as engine:
            responses = list(engine.rollout_sync(groups_of(2)))
        _, said = running.communicate(timeout=30)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 0, said
    assert len(content(responses)) == 8
    hosts = (tmp_path / "hosts").read_text().split()
    assert sorted(hosts) == ["one", "one", "two", "two"]
    key = tmp_path / ".config" / "aseer" / "key"
    assert key.read_text() == KEY
    assert key.stat().st_mode & 0o777 == 0o600
    assert sys.executable in script.read_text()
    assert list(logs.glob("instance-*.log"))
