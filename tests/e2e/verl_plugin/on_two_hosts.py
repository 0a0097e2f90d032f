"""Runs a command where Ray has two hosts, both on this machine.

python on_two_hosts.py COMMAND...
"""

from __future__ import annotations

import os
import subprocess
import sys

from contract import two_hosts


def main() -> int:
    cluster = two_hosts()
    try:
        environ = os.environ | {"RAY_ADDRESS": cluster.address}
        return subprocess.run(sys.argv[1:], env=environ, check=False).returncode
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
