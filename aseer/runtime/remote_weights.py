"""New weights on their way to other hosts, before instances there load them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from aseer.errors import EngineError, describe
from aseer.weights.files import read_index

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aseer.node.supply import Supply
    from aseer.weights.files import Index


def once_there(
    supplies: Sequence[Supply], index: str, ask: Callable[..., asyncio.Future[Any]]
) -> asyncio.Future[Any]:
    """Have an instance's hosts fetch weights, then ask the instance; what it answers.

    Args:
        supplies: of its hosts.
        index: path of an `Index`, on this machine.
        ask: is given the path of the index on each host.

    The future raises what `Supply.fetch` does if the weights do not come, and
    EngineError if they are gone or the instance cannot take them.
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

    def there(fetched: asyncio.Future[list[str]]) -> None:
        try:
            ask(*fetched.result()).add_done_callback(pass_on)
        except Exception as error:
            _fail(outcome, error)

    try:
        files = read_index(index)
        index_of = partial(_index_at, files)
        all_of_them = [each.fetch(index, files.files, index_of) for each in supplies]
        asyncio.gather(*all_of_them).add_done_callback(there)
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
