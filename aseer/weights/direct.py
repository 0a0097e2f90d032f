"""Weights from a trainer's GPUs straight to engines, without the host's memory.

    the trainer's processes                       all engines
    HeldTensors: all is checked
    carrier.get_ready     ---- look, init ---->   nothing has changed yet
                          ---- start --------->   from here on an engine that fails is
    carrier.send          ---- update, ... --->   started again
                          ---- finish -------->   its caches are emptied

One process of the trainer has the engine, and makes the calls. The others, if there are
any, take part in what the tensors are gathered by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aseer.errors import WeightUpdateError
from aseer.weights.carriers import IpcCarrier, NcclCarrier
from aseer.weights.held import HeldTensors, is_held_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from aseer.weights.carriers import Carrier, Engines
    from aseer.weights.checks import ModelSpec
    from aseer.weights.sending import WeightSource


class Way(NamedTuple):
    """A way to send weights.

    Attributes:
        backend: the name of vLLM's half, in `weight_transfer_config`.
        device: where the trainer's tensors must be.
    """

    carrier: Callable[[HeldTensors], Carrier]
    backend: str
    device: str


#: By the value of `transfer`.
WAYS: dict[str, Way] = {
    "ipc": Way(IpcCarrier, "ipc", "cuda"),
    "nccl": Way(NcclCarrier, "nccl", "cuda"),
}
# Of this process's engines, by the directory of the update; see `engines_of`.
_ENGINES: dict[str, Engines] = {}


class SentDirectly(NamedTuple):
    """What was sent."""

    num_tensors: int
    num_bytes: int


def send_directly(
    source: WeightSource, model: ModelSpec, transfer: str, engines: Engines | None
) -> SentDirectly:
    """Check a source's tensors, and send them all.

    Args:
        engines: None in processes of the trainer that do not have the engine.
    Raises:
        WeightUpdateError: the tensors are not what the model takes or cannot be sent
            so, and nothing has changed; or an engine failed.
    """
    way = WAYS[transfer]
    tensors = HeldTensors(source, model, transfer, way.device)
    carrier = way.carrier(tensors)
    try:
        carrier.get_ready(engines)
        if engines is not None:
            engines.start().result()
        carrier.send(engines, tensors)
        if engines is not None:
            engines.finish().result()
    finally:
        carrier.close()
    return SentDirectly(len(tensors.sent), tensors.num_bytes)


def chosen_way(transfer: str, source: WeightSource, backend: str | None) -> str:
    """How a source is sent: "host", or one of `WAYS`.

    "auto" goes straight to the engines if they were started for that, and the tensors
    are all at hand where that needs them.

    Args:
        backend: of vLLM's, with which the engines were started; None = with none.
    """
    if transfer != "auto":
        return transfer
    for name, way in WAYS.items():
        if way.backend == backend and is_held_on(source, way.device):
            return name
    return "host"


def check_started_for(transfer: str, backend: str | None) -> None:
    """See that engines take weights so.

    Args:
        backend: as for `chosen_way`.
    Raises:
        WeightUpdateError: they were started for something else.
    """
    needed = WAYS[transfer].backend
    if backend != needed:
        started = "without a transfer of weights"
        if backend is not None:
            started = f"for transfers by {backend!r}"
        raise WeightUpdateError(
            f"the engines were started {started}, and transfer={transfer!r} needs "
            f"{needed!r} as the backend in engine_args['weight_transfer_config']"
        )


def offer_engines(directory: str, engines: Engines) -> None:
    """Let `engines_of` find an update's engines in this process."""
    _ENGINES[directory] = engines


def withdraw_engines(directory: str) -> None:
    """The update is over."""
    _ENGINES.pop(directory, None)


def engines_of(directory: str) -> Engines | None:
    """The engines of an update; None if the engine is in another process."""
    return _ENGINES.get(directory)
