"""New weights on their way to other hosts, before instances there load them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from aseer.errors import EngineError, describe
from aseer.weights.files import read_index

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.node.remote import RemoteNode
    from aseer.weights.files import Index


def once_there(
    node: RemoteNode, index: str, ask: Callable[[str], asyncio.Future[Any]]
) -> asyncio.Future[Any]:
    """Have a node fetch weights, then ask an instance of it; what that answers.

    Args:
        index: path of an `Index`, on this machine.
        ask: is given the path of the index on the node.

    The future raises EngineError if the weights are gone or do not come, as it does if
    the instance cannot take them.
    """
    outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def pass_on(asked: asyncio.Future[Any]) -> None:
        if outcome.done():
            return
        error = asked.exception()
        if error is None:
            outcome.set_result(asked.result())
        else:
            _fail(outcome, error)

    def there(fetched: asyncio.Future[str]) -> None:
        try:
            ask(fetched.result()).add_done_callback(pass_on)
        except Exception as error:
            _fail(outcome, error)

    try:
        files = read_index(index)
        fetched = node.weights.fetch(index, files.files, partial(_index_at, files))
        fetched.add_done_callback(there)
    except Exception as error:
        _fail(outcome, error)
    return outcome


def _index_at(index: Index, paths: list[str]) -> bytes:
    """The index, of files that lie elsewhere."""
    return msgspec.json.encode(msgspec.structs.replace(index, files=paths))


def _fail(outcome: asyncio.Future[Any], error: BaseException) -> None:
    if not outcome.done():
        if not isinstance(error, EngineError):
            error = EngineError(describe(error))
        outcome.set_exception(error)
        outcome.exception()  # whoever asked may not wait for it
