"""`aseer node`: lends this host's GPUs to a controller on another."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aseer.cli.arguments import positive_float, positive_int
from aseer.errors import ConfigError
from aseer.inputs.addresses import check_address
from aseer.node.agent import NoController, NodeRefused, Offer, run_agent
from aseer.node.interpreter import interpreter_at
from aseer.node.machine import this_machine
from aseer.transport.base import ConnectionRefused
from aseer.transport.keys import find_keys
from aseer.transport.tcp import check_key_is_there

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

EXIT_REFUSED = 2
EXIT_NO_CONTROLLER = os.EX_TEMPFAIL  # 75: what started it may start it again
_LOOK_INTERVAL_S = 1.0
_VARIABLE = "ASEER_CONTROLLER"
_FILE_VARIABLE = "ASEER_CONTROLLER_FILE"


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add the `node` command."""
    parser = subparsers.add_parser(
        "node",
        parents=[common],
        help="run engines on this host for a controller on another",
        description="Run engines on this host for an aseer.Engine on another that "
        "listens. Exit status: 0 the engine was closed, or this was told to end; 1 an "
        "error; 2 the controller refuses this node (another key or release, or it "
        "cannot do the work); 75 no controller was found.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--controller",
        metavar="ADDRESS",
        help=f"tcp://HOST:PORT of the engine's `listen` (default: ${_VARIABLE})",
    )
    where.add_argument(
        "--controller-file",
        metavar="FILE",
        type=Path,
        help="that the engine writes its address to; it is waited for (default: "
        f"${_FILE_VARIABLE})",
    )
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help="with the cluster's key (default: $ASEER_KEY, $ASEER_KEY_FILE or "
        "~/.config/aseer/key)",
    )
    parser.add_argument(
        "--name",
        default=socket.gethostname(),
        help="by which messages name this node (default: the host's)",
    )
    parser.add_argument(
        "--gpus",
        metavar="IDS",
        help="to use, such as 0,1 (default: all that are visible)",
    )
    parser.add_argument(
        "--num-instances",
        metavar="N",
        type=positive_int,
        help="engines to run (default: as many as the GPUs or cores are for)",
    )
    parser.add_argument(
        "--python", metavar="PATH", help="interpreter that engines run on"
    )
    parser.add_argument(
        "--log-dir", metavar="DIR", type=Path, help="keeps the engines' logs"
    )
    parser.add_argument(
        "--death-timeout",
        metavar="SECONDS",
        type=positive_float,
        default=600.0,
        help="end after so long without a controller (default: 600)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until the controller or a signal ends it."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s"
    )
    try:
        why = asyncio.run(_serve(args))
    except (ConnectionRefused, NodeRefused) as error:
        return _fail(str(error), EXIT_REFUSED)
    except NoController as error:
        return _fail(str(error), EXIT_NO_CONTROLLER)
    sys.stderr.write(f"aseer: {why}\n")
    return 0


async def _serve(args: argparse.Namespace) -> str:
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    assert this is not None

    def on_signal() -> None:
        if leave.is_set():
            this.cancel()  # the second time: at once
        leave.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        offer = _offer(args, await _find(args, os.environ, leave))
        return await run_agent(offer, leave)
    except asyncio.CancelledError:
        return "it was told to end at once"
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _offer(args: argparse.Namespace, controller: str) -> Offer:
    python = interpreter_at(args.python)
    machine = this_machine(python.packages)
    if args.gpus is not None:
        gpus = tuple(gpu.strip() for gpu in args.gpus.split(",") if gpu.strip())
        machine = replace(machine, gpus=gpus)
    keys = find_keys(args.key_file)
    check_key_is_there("controller", controller, keys)
    log_dir = args.log_dir
    if log_dir is not None:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--log-dir cannot be used: {error}") from error
    return Offer(
        controller=controller,
        keys=keys,
        name=args.name,
        machine=machine,
        interpreter=python,
        num_instances=args.num_instances,
        log_dir=None if log_dir is None else log_dir.absolute(),
        death_timeout_s=args.death_timeout,
    )


async def _find(
    args: argparse.Namespace, environ: Mapping[str, str], leave: asyncio.Event
) -> str:
    """The controller's address; waits for the file that says it.

    Raises:
        ConfigError: nothing says it, or what does is no address.
        NoController: no file came within the death time-out.
    """
    if args.controller is not None:
        return check_address("--controller", args.controller)
    path = args.controller_file
    if path is None and _VARIABLE in environ:
        return check_address(_VARIABLE, environ[_VARIABLE])
    if path is None and _FILE_VARIABLE in environ:
        path = Path(environ[_FILE_VARIABLE])
    if path is None:
        raise ConfigError(
            "nothing says where the controller is; give --controller tcp://HOST:PORT "
            "or --controller-file FILE, as the engine's `listen` and `controller_file`"
        )
    loop = asyncio.get_running_loop()
    deadline = loop.time() + args.death_timeout
    while not path.exists():
        if loop.time() > deadline or leave.is_set():
            raise NoController(f"there is no file {path} that names a controller")
        await asyncio.sleep(_LOOK_INTERVAL_S)
    try:
        address = json.loads(path.read_text())["address"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} names no controller: {error!r}") from error
    return check_address(str(path), address)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"aseer: error: {message}\n")
    return code
