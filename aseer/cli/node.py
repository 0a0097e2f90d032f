"""`aseer node`: lends this host's GPUs to a controller on another."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aseer.cli.arguments import host_and_port, positive_float, positive_int
from aseer.cli.node_scripts import SCRIPTS, script_for
from aseer.errors import ConfigError
from aseer.inputs.addresses import check_address
from aseer.kv.agent import PoolAgent
from aseer.node.agent import NoController, NodeRefused, Offer, run_agent
from aseer.node.cleanup import SHARED_MEMORY
from aseer.node.interpreter import interpreter_at
from aseer.node.machine import this_machine
from aseer.node.metrics import (
    AGENT_METRICS,
    AgentFigures,
    MetricsServer,
    check_metrics_library,
)
from aseer.transport.base import ConnectionRefused
from aseer.transport.keys import find_keys
from aseer.transport.tcp import check_key_is_there

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    from aseer.transport.keys import Keys

_log = logging.getLogger("aseer")

EXIT_REFUSED = 2
EXIT_NO_CONTROLLER = os.EX_TEMPFAIL  # 75: what started it may start it again
_DEATH_TIMEOUT_S = 600.0
_LOOK_INTERVAL_S = 1.0
# Less than this is a container's default, and too little for any model's weights.
_SHARED_MEMORY_BYTES = 1 << 30
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
        "--name", help="by which messages name this node (default: the host's)"
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
        help="engines to run, or parts of engines that span nodes (default: as many as "
        "the GPUs or cores are for)",
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
        help=f"end after so long without a controller (default: {_DEATH_TIMEOUT_S:g})",
    )
    parser.add_argument(
        "--lifetime",
        metavar="SECONDS",
        type=positive_float,
        help="leave in order after so long, as before a batch job's time is over",
    )
    parser.add_argument(
        "--metrics-address",
        metavar="HOST:PORT",
        type=host_and_port,
        help="where Prometheus finds this node's figures (default: nowhere)",
    )
    parser.add_argument(
        "--print",
        choices=list(SCRIPTS),
        dest="launcher",
        help="print a script that starts nodes on many hosts, with the other options "
        "that are given, and do nothing else",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until the controller, a signal or the end of its lifetime ends it."""
    if args.launcher is not None:
        sys.stdout.write(script_for(args.launcher, args))
        return 0
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s"
    )
    try:
        with _metrics(args.metrics_address) as figures:
            why = asyncio.run(_serve(args, figures))
    except (ConnectionRefused, NodeRefused) as error:
        return _fail(str(error), EXIT_REFUSED)
    except NoController as error:
        return _fail(str(error), EXIT_NO_CONTROLLER)
    sys.stderr.write(f"aseer: {why}\n")
    return 0


@contextmanager
def _metrics(address: str | None) -> Iterator[AgentFigures]:
    """Serve the figures that the block fills in, if an address is given.

    Raises:
        ConfigError: they cannot be served there.
    """
    figures = AgentFigures()
    if address is None:
        yield figures
        return
    check_metrics_library("--metrics-address")
    server = MetricsServer(address, AGENT_METRICS, figures.values)
    try:
        _log.info("figures of this node are at %s", server.url)
        yield figures
    finally:
        server.close()


async def _serve(args: argparse.Namespace, figures: AgentFigures) -> str:
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    assert this is not None
    _warn_of_little_memory()

    def on_signal() -> None:
        if leave.is_set():
            this.cancel()  # the second time: at once
        leave.set()

    def on_end_of_life() -> None:
        _log.info("this node's lifetime of %g s is over", args.lifetime)
        leave.set()

    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else it is to be ignored
        signals.append(signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    if args.lifetime is not None:
        loop.call_later(args.lifetime, on_end_of_life)
    try:
        address = await _find(args, os.environ, leave)
        if address is None:
            return "it was told to end"
        offer = _offer(args, address, _file_of(args, os.environ))
        return await run_agent(offer, leave, figures)
    except asyncio.CancelledError:
        return "it was told to end at once"
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _warn_of_little_memory(folder: Path = SHARED_MEMORY) -> None:
    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return
    if size < _SHARED_MEMORY_BYTES:
        _log.warning(
            "%s has %.0f MB, and new weights are kept there, twice during an update; "
            "in a container mount more (Kubernetes: an emptyDir with medium: Memory)",
            folder,
            size / 1e6,
        )


def _offer(args: argparse.Namespace, controller: str, path: Path | None) -> Offer:
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
        name=args.name or socket.gethostname(),
        machine=machine,
        interpreter=python,
        num_instances=args.num_instances,
        log_dir=None if log_dir is None else log_dir.absolute(),
        death_timeout_s=_death_timeout_s(args),
        make_pool=PoolAgent,
        look_again=partial(_look_again, path, keys),
    )


def _death_timeout_s(args: argparse.Namespace) -> float:
    return _DEATH_TIMEOUT_S if args.death_timeout is None else float(args.death_timeout)


async def _find(
    args: argparse.Namespace, environ: Mapping[str, str], leave: asyncio.Event
) -> str | None:
    """The controller's address; waits for the file that says it, or returns None once
    `leave` is set.

    Raises:
        ConfigError: nothing says it, or what does is no address.
        NoController: no file came within the death time-out.
    """
    if args.controller is not None:
        return check_address("--controller", args.controller)
    path = _file_of(args, environ)
    if path is None and _VARIABLE in environ:
        return check_address(_VARIABLE, environ[_VARIABLE])
    if path is None:
        raise ConfigError(
            "nothing says where the controller is; give --controller tcp://HOST:PORT "
            "or --controller-file FILE, as the engine's `listen` and `controller_file`"
        )
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _death_timeout_s(args)
    while not path.exists():
        if leave.is_set():
            return None
        if loop.time() > deadline:
            raise NoController(f"there is no file {path} that names a controller")
        await asyncio.sleep(_LOOK_INTERVAL_S)
    return _address_in(path)


def _file_of(args: argparse.Namespace, environ: Mapping[str, str]) -> Path | None:
    """The file that says where the controller is, if one does."""
    if args.controller is not None:
        return None
    if args.controller_file is not None:
        return Path(args.controller_file)
    if _VARIABLE in environ or _FILE_VARIABLE not in environ:
        return None
    return Path(environ[_FILE_VARIABLE])


def _address_in(path: Path) -> str:
    """The address in a controller's file.

    Raises:
        ConfigError: there is none.
    """
    try:
        address = json.loads(path.read_text())["address"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} names no controller: {error!r}") from error
    return check_address(str(path), address)


def _look_again(path: Path | None, keys: Keys | None) -> str | None:
    """The address in the file by now, if there is one that may be connected to.

    A controller that was killed leaves its file, and the next one may be elsewhere.
    """
    if path is None:
        return None
    try:
        address = _address_in(path)
        check_key_is_there("controller", address, keys)
    except ConfigError:
        return None
    return address


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"aseer: error: {message}\n")
    return code
