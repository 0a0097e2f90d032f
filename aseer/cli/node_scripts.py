"""Scripts that start `aseer node` on many hosts: `aseer node --print slurm|k8s|ssh`."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

from aseer.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

PORT = 5557
"""That the scripts and the documentation use, for the engine's `listen`."""

_SLURM = """\
#!/bin/bash
# Nodes for an aseer.Engine, one on each host of a Slurm job. Submit this with
#     sbatch --nodes=4 {file}
# to lend the hosts to an engine that runs elsewhere, or with
#     sbatch --nodes=4 {file} python train.py
# to run the trainer on the first of them, too. All hosts need ~/.config/aseer/key, that
# `aseer key` makes. The trainer's EngineConfig needs listen="tcp://0.0.0.0:{port}" and
# controller_file=os.environ["ASEER_CONTROLLER_FILE"].
#SBATCH --job-name=aseer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
set -euo pipefail

# Where the engine says how it is reached, on a file system that all hosts share.
: "${{ASEER_CONTROLLER_FILE:=$SLURM_SUBMIT_DIR/aseer-$SLURM_JOB_ID.json}}"
export ASEER_CONTROLLER_FILE
node=(aseer node)

if (($# == 0)); then
    # The nodes leave in order two minutes before the job's time is over.
    left=$((${{SLURM_JOB_END_TIME:-0}} - $(date +%s) - 120))
    if ((left > 0)); then
        node+=(--lifetime "$left")
    fi
    exec srun --kill-on-bad-exit=0 "${{node[@]}}"{options}
fi
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    srun --nodes=$others --ntasks=$others --relative=1 --kill-on-bad-exit=0 \\
        "${{node[@]}}"{options} &
fi
srun --nodes=1 --ntasks=1 --relative=0 "$@"
wait
"""

_KUBERNETES = """\
# Nodes for an aseer.Engine, one a pod. First the key, then the nodes:
#     kubectl create secret generic aseer-key --from-file=key="$HOME/.config/aseer/key"
#     kubectl apply -f {file}
# The trainer's pod needs the label `app: aseer-trainer`, ASEER_KEY of that Secret, and
# EngineConfig(listen="tcp://0.0.0.0:{port}").
{service}apiVersion: apps/v1
kind: Deployment
metadata:
  name: aseer-node
spec:
  replicas: 2
  selector:
    matchLabels:
      app: aseer-node
  template:
    metadata:
      labels:
        app: aseer-node
    spec:
      # A node that is told to end hands its work over first, in at most 20 s.
      terminationGracePeriodSeconds: 60
      containers:
        - name: node
          image: your-registry/aseer-and-vllm:latest
          command: {command}
          env:
            - name: ASEER_KEY
              valueFrom:
                secretKeyRef:
                  name: aseer-key
                  key: key
          resources:
            limits:
              nvidia.com/gpu: 8
          volumeMounts:
            - name: shared-memory
              mountPath: /dev/shm
      volumes:
        # New weights are kept there, twice during an update: twice the model's size.
        - name: shared-memory
          emptyDir:
            medium: Memory
            sizeLimit: 64Gi
"""

_SERVICE = f"""\
apiVersion: v1
kind: Service
metadata:
  name: aseer-trainer
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    app: aseer-trainer
  ports:
    - name: nodes
      port: {PORT}
---
"""

_SSH = """\
#!/bin/bash
# Nodes for an aseer.Engine, over ssh, one on each host that is named:
#     bash {file} gpu1 gpu2 gpu3
# Run this on the trainer's host, whose EngineConfig needs listen="tcp://0.0.0.0:{port}".
# The nodes end with the engine, or with this script: Ctrl-C has them leave in order.
set -euo pipefail

if (($# == 0)); then
    echo "usage: $0 HOST..." >&2
    exit 2
fi
: "${{ASEER_CONTROLLER:=tcp://$(hostname -f):{port}}}"
key=${{ASEER_KEY_FILE:-$HOME/.config/aseer/key}}
place='umask 077; mkdir -p ~/.config/aseer; cd ~/.config/aseer; cat >new; mv new key'
node=(env ASEER_CONTROLLER="$ASEER_CONTROLLER" {python} -m aseer node{options})

for host in "$@"; do
    ssh "$host" "$place" <"$key" # not as an argument, which others there could see
done
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for host in "$@"; do
    # With a terminal (-tt) the node hears when this end of the connection is gone.
    ssh -tt "$host" "${{node[*]@Q}}" </dev/null &
done
wait
"""


def _slurm(options: str) -> str:
    return _SLURM.format(file="aseer-nodes.sh", port=PORT, options=options)


def _kubernetes(options: str) -> str:
    words = ["aseer", "node", *shlex.split(options)]
    service = ""
    if not {"--controller", "--controller-file"} & set(words):
        service = _SERVICE
        words += ["--controller", f"tcp://aseer-trainer:{PORT}"]
    return _KUBERNETES.format(
        file="aseer-nodes.yaml", port=PORT, service=service, command=json.dumps(words)
    )


def _ssh(options: str) -> str:
    return _SSH.format(
        file="aseer-nodes.sh",
        port=PORT,
        python=shlex.quote(sys.executable),
        options=options,
    )


SCRIPTS: Mapping[str, Callable[[str], str]] = {
    "slurm": _slurm,
    "k8s": _kubernetes,
    "ssh": _ssh,
}

# What each of many hosts may be told alike, by the names of the parsed arguments.
_COMMON = (
    "controller",
    "controller_file",
    "key_file",
    "gpus",
    "num_instances",
    "python",
    "log_dir",
    "death_timeout",
    "lifetime",
    "metrics_address",
)


def script_for(launcher: str, args: argparse.Namespace) -> str:
    """A script that starts nodes by a launcher, with the options that were given.

    Args:
        launcher: a key of `SCRIPTS`.
        args: of `aseer node`, where None stands for what was not given.
    Raises:
        ConfigError: an option is for one host alone.
    """
    if args.name is not None:
        raise ConfigError(
            "--name names one node, and a script starts many; leave it out, and each "
            "node has its host's name"
        )
    words: list[str] = []
    for name in _COMMON:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return SCRIPTS[launcher](f" {shlex.join(words)}" if words else "")
