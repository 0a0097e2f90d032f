"""`aseer serve`: an engine over HTTP, for trainers that speak vLLM's token wire."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
from dataclasses import fields
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from rich.console import Console

from aseer.cli.arguments import positive_int
from aseer.cli.summary import Stages
from aseer.config import EngineConfig
from aseer.errors import ConfigError
from aseer.inputs.fields import MAX_PORT
from aseer.runtime.desk import JOIN_S
from aseer.runtime.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_VARIABLE = "ASEER_API_KEY"
DEFAULT_PORT = 8000
_BACKLOG = 4096  # thousands of agent loops connect at once
# What is left of requests at the end, whose clients are told that it is the end.
_SHUTDOWN_S = 5.0


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add `serve` and its options."""
    parser = subparsers.add_parser(
        "serve",
        parents=[common],
        help="serve token ids over HTTP, for trainers that speak vLLM's wire",
        description="Open an engine and serve POST /inference/v1/generate, pause, "
        "resume and weight updates over HTTP, until Ctrl-C. Needs aiohttp: pip "
        'install "aseer[serve]".',
    )
    parser.add_argument("model", help="a model's name or directory, as vLLM takes it")
    http = parser.add_argument_group("http")
    http.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; any but a loopback one needs a key "
        "(default: %(default)s)",
    )
    http.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        metavar="N",
        help="0 = any that is free (default: %(default)s)",
    )
    http.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"that clients must send as a bearer token (default: ${KEY_VARIABLE})",
    )
    http.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the model's name to clients (default: MODEL)",
    )
    http.add_argument(
        "--join-s",
        type=_seconds,
        default=JOIN_S,
        metavar="SECONDS",
        help="equal requests that come within this time of the first become one group "
        "(default: %(default)s)",
    )
    engines = parser.add_argument_group("engines")
    engines.add_argument("--instances", type=positive_int, metavar="N")
    engines.add_argument("--gpus-per-instance", type=positive_int, metavar="N")
    engines.add_argument("--device", choices=("auto", "cuda", "cpu", "sim"))
    engines.add_argument("--dtype")
    engines.add_argument("--max-model-len", type=positive_int, metavar="N")
    engines.add_argument("--max-num-seqs", type=positive_int, metavar="N")
    engines.add_argument("--chunk-size", type=int, metavar="N")
    engines.add_argument("--speculation", choices=("off", "dgds", "suffix", "ngram"))
    engines.add_argument("--log-dir", metavar="DIR")
    engines.add_argument(
        "--settings",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further settings of aseer.EngineConfig, such as "
        '\'{"engine_args": {"enforce_eager": true}}\'',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        AseerError: a wrong option, the address is taken, the engines do not start, or
            they failed for good.
    """
    config = make_config(args)
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    check_address(args.host, key)
    console = Console(highlight=False)
    with bound_socket(args.host, args.port) as listener:
        name = args.served_model_name or args.model
        asyncio.run(serve(config, listener, name, key, console, join_s=args.join_s))
    return 0


def make_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's settings that the options ask for.

    Raises:
        ConfigError: a setting that is unknown, given twice, or not allowed.
    """
    given: dict[str, Any] = {
        "num_instances": args.instances,
        "gpus_per_instance": args.gpus_per_instance,
        "device": args.device,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "chunk_size": args.chunk_size,
        "speculation": args.speculation,
        "log_dir": args.log_dir,
    }
    given = {name: value for name, value in given.items() if value is not None}
    known = {field.name for field in fields(EngineConfig)} - {"model"}
    unknown = sorted(args.settings.keys() - known)
    if unknown:
        raise ConfigError(
            f"--settings has {unknown}, which aseer.EngineConfig does not have; it has "
            f"{sorted(known)}"
        )
    twice = sorted(args.settings.keys() & given.keys())
    if twice:
        raise ConfigError(f"--settings has {twice}, for which there are options, too")
    return EngineConfig(model=args.model, **given, **args.settings)


def check_address(host: str, key: str | None) -> None:
    """See that nobody but this machine's users is served without a key.

    Raises:
        ConfigError: others could call.
    """
    if key is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and there is no key; "
            f"give --api-key, or set {KEY_VARIABLE}"
        )


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address, and refuses connections until it listens.

    Raises:
        ConfigError: the address cannot be had.
    """
    if not 0 <= port <= MAX_PORT:  # the system would take another, by its lowest bits
        raise ConfigError(f"--port {port} is not allowed; give one up to {MAX_PORT}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error}") from None
    return listener


async def serve(
    config: EngineConfig,
    listener: socket.socket,
    name: str,
    key: str | None,
    console: Console,
    on_ready: Callable[[str], None] = lambda url: None,
    *,
    join_s: float = JOIN_S,
) -> None:
    """Open the engine and serve it until cancelled.

    Args:
        listener: bound to the address.
        name: of the model, to clients.
        key: that clients must send; None = none.
        on_ready: called with the server's URL once it serves.
        join_s: see `Engine.open_rollout`.
    """
    try:
        from aiohttp import web
    except ImportError:
        raise ConfigError(
            'aseer serve needs aiohttp: run `pip install "aseer[serve]"`'
        ) from None
    from aseer.server.app import App
    from aseer.server.front import Front

    stages = Stages(console)
    with stages("start", "starting the engines"):
        engine = await Engine(config).__aenter__()
    try:
        front = Front(engine, join_s=join_s)
        app = App(engine, front, model=name, api_key=key)
        # A client that hangs up ends its request.
        runner = web.AppRunner(
            app.web,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # a client that hangs up ends its request
            shutdown_timeout=_SHUTDOWN_S,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, listener, backlog=_BACKLOG).start()
            url = _url_of(listener)
            console.print(f"serving {name} at {url} (Ctrl-C ends it)", markup=False)
            on_ready(url)
            await front.run()
        finally:
            await runner.cleanup()
    finally:
        await engine.aclose()


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give seconds >= 0")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
