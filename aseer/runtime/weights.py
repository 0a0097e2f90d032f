"""The weights that the instances have, and how they change; on the engine's thread.

The sender's part is between `begin` and `switch`: it writes in its own thread. From
`begin` to the end of `switch` an update has the engine for itself (its `Claim`): only
one runs at a time, and no rollout begins before it is over.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from aseer.errors import EngineError, InstanceLostError, WeightUpdateError, describe
from aseer.inputs.plain import as_int
from aseer.node.children import in_thread
from aseer.node.cleanup import (
    free_later,
    remove_folder,
    wait_until_freed,
    weights_dir_for,
)
from aseer.node.machine import free_memory_bytes
from aseer.weights.checks import ModelSpec
from aseer.weights.current import CurrentWeights, TrainersWeights
from aseer.weights.files import INDEX, make_directory
from aseer.weights.mappings import Mappings, unmap
from aseer.weights.update import (
    Commit,
    Decide,
    Discard,
    Prepare,
    Replace,
    TakeBack,
    UpdateState,
    WeightUpdate,
)
from aseer.weights.writer import DATA, free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aseer.config import EngineConfig
    from aseer.runtime.claims import Claim
    from aseer.runtime.direct_update import DirectUpdate
    from aseer.runtime.instances import InstancePool
    from aseer.types import InstanceId
    from aseer.weights.update import UpdateCommand

_log = logging.getLogger("aseer")

Pause = Literal["abort", "wait"]
_SPARE = "spare"  # the file of the weights before the current ones
MAX_VERSION = (1 << 63) - 1  # what a message, and vLLM's key of cached KV, can hold
NO_INSTANCE = (
    "no instance is up at the moment; what was lost is started again: try again then"
)

NO_WEIGHTS = (
    "every instance has died since the last weight update, whose weights came straight "
    "from the trainer: call update_weights"
)

DROPPED = (
    "the engine's weights went with sleep(level=2), and no update has brought others "
    "since: call update_weights first, or use sleep(level=1), which keeps them"
)


def weights_dir_of(config: EngineConfig, run_dir: Path) -> Path:
    """Where tensors for the engines go: memory, if it can be shared as files."""
    if config.weights_dir is not None:
        return config.weights_dir.resolve() / run_dir.name
    return weights_dir_for(run_dir)


class Plan(NamedTuple):
    """An update that was begun: what its sender needs to know, and its claim.

    Attributes:
        mappings: of files that updates are written into, for a sender of this process.
    """

    version: int
    directory: Path
    model: ModelSpec
    claim: Claim
    mappings: Mappings | None = None


class SwitchTimes(NamedTuple):
    """Seconds that instances took to prepare, and then to switch."""

    prepare_s: float
    switch_s: float


class WeightKeeper:
    """Knows the current version and takes the instances to the next."""

    def __init__(self, directory: Path) -> None:
        """`directory` is for what engines map, a folder an update."""
        self._directory = directory
        self._spare = directory / _SPARE
        self._mappings = Mappings()
        self.version = 0
        self.lacks_whole = False
        """Whether instances dropped their weights, and had no others since."""
        self._model: ModelSpec | None = None
        self._switch: _Switch | None = None
        self._num_plans = 0

    def next_version(self, given: object) -> int:
        """The version of the next update, as given, or the one after the current.

        Raises:
            WeightUpdateError: what is given is not a later one.
        """
        wanted = self.version + 1 if given is None else as_int(given)
        if wanted is None:
            raise WeightUpdateError(
                f"version={given!r:.100} is not an int; give one greater than the "
                f"engine's {self.version}, or none"
            )
        if wanted <= self.version:
            raise WeightUpdateError(
                f"version={wanted} does not follow the engine's {self.version}; "
                "give a greater one, or none"
            )
        if wanted > MAX_VERSION:
            raise WeightUpdateError(
                f"version={wanted} is not allowed; give one up to {MAX_VERSION}"
            )
        return wanted

    async def begin(
        self,
        pool: InstancePool,
        instances: Iterable[InstanceId],
        version: int | None,
        claim: Claim,
    ) -> Plan:
        """Plan the next update; `abandon` or the end of `switch` gives the claim back.

        Raises:
            WeightUpdateError: the version is not a later one, or there is no place for
                new weights.
            EngineError: no instance can say what it takes.
        """
        wanted = self.next_version(version)
        model = self._model = self._model or await _describe(pool, sorted(instances))
        await in_thread(wait_until_freed)  # or there would seem to be no room
        self._num_plans += 1
        directory = self._directory / f"{wanted}-{self._num_plans}"
        make_directory(directory)
        with suppress(OSError):  # there is none: the sender makes a file of its own
            self._spare.rename(directory / DATA)
        return Plan(wanted, directory, model, claim, self._mappings)

    def abandon(self, plan: Plan) -> None:
        """Give an update up that was only begun."""
        remove_folder(plan.directory)
        self._drop_mappings()
        plan.claim.release()

    async def switch(
        self,
        plan: Plan,
        pool: InstancePool,
        instances: Iterable[InstanceId],
        *,
        is_adapters: bool = False,
    ) -> SwitchTimes:
        """Take every instance to weights that lie ready, or none.

        Args:
            is_adapters: whether they are adapters for the whole weights that are there.
        Raises:
            WeightUpdateError: the instances have the weights that they had.
        """
        old, index = pool.weights, str(plan.directory / INDEX)
        new = old.after(index, is_adapters=is_adapters)
        self._switch = switch = _Switch(pool, old, new, index)
        try:
            if is_adapters and self.lacks_whole:
                raise WeightUpdateError(
                    "the engine's whole weights went with sleep(level=2): give it "
                    "those first, such as the base model's, and then adapters"
                )
            times = await switch.run(instances)
            if times is None:
                why = switch.update.error
                raise WeightUpdateError(f"{why}; the engine stays at {self.version}")
            self.version = plan.version
            self.lacks_whole = False
            return times
        finally:
            self._switch = None
            kept = new if self.version == plan.version else old
            for path in (old.paths | {index}) - kept.paths:
                # All instances have loaded newer ones, if these were ever loaded.
                self._drop_files(pool, path)
            self._drop_mappings()

    def settle(self, plan: Plan, pool: InstancePool, update: DirectUpdate) -> None:
        """All instances of a direct update have its weights; others have older ones."""
        old = pool.weights
        self.version = plan.version
        self.lacks_whole = False
        theirs = TrainersWeights(update.holders, f"direct-{secrets.token_hex(8)}")
        pool.weights = CurrentWeights(theirs)
        for instance_id in pool.up:
            if pool.identity_of(instance_id) not in update.holders:
                pool.replace(instance_id, "it came up while weights were sent")
        for path in old.paths:
            self._drop_files(pool, path)
        self._spare.unlink(missing_ok=True)
        remove_folder(plan.directory)
        self._drop_mappings()

    def failed(self, plan: Plan, pool: InstancePool) -> str:
        """A direct update ended without new weights; what the engine has, in words."""
        remove_folder(plan.directory)
        if isinstance(pool.weights.whole, TrainersWeights):
            return (
                f"the weights of version {self.version} came straight from the trainer "
                "as well, so the engine waits for the next update"
            )
        return f"the engine stays at {self.version}"

    def _drop_files(self, pool: InstancePool, index: str) -> None:
        """No instance will load the files of an update any more.

        What was written for it is kept for the next update if there is ample memory: a
        file that has its pages is written in half the time. All instances have other
        weights by then, from another file.
        """
        pool.drop_weights(index)
        written = Path(index).parent / DATA
        with suppress(OSError):  # nothing was written: a checkpoint's own files count
            if _is_ample(written.stat().st_size, self._directory):
                written.rename(self._spare)
        remove_folder(written.parent)

    def _drop_mappings(self) -> None:
        """Let go of files that are in none of the updates' folders any more."""
        left = [self._spare, *self._directory.glob(f"*/{DATA}")]
        dropped = self._mappings.take_but(left)
        if dropped:
            free_later(lambda: unmap(dropped))

    def close(self) -> None:
        """Let go of all files; the engine is over."""
        unmap(self._mappings.take_but(()))

    def instance_up(self, instance_id: InstanceId) -> None:
        """It has the weights that are current at this moment."""
        if self._switch is not None:
            update = self._switch.update
            self._switch.do(lambda: update.joined(instance_id))

    def instance_down(self, instance_id: InstanceId, why: str) -> None:
        """It is gone."""
        if self._switch is not None:
            update = self._switch.update
            self._switch.do(lambda: update.lost(instance_id, why))

    def give_up(self, why: str) -> None:
        """Fail an update that waits for instances, since none will answer any more."""
        if self._switch is not None:
            self._switch.give_up(why)


class _Switch:
    """Carries an update's commands out."""

    def __init__(
        self, pool: InstancePool, old: CurrentWeights, new: CurrentWeights, index: str
    ) -> None:
        self.update = WeightUpdate()
        self._pool = pool
        self._old = old
        self._new = new
        self._index = index  # what instances with the old ones load
        self._over = asyncio.Event()
        self._decided_at = 0.0

    async def run(self, instances: Iterable[InstanceId]) -> SwitchTimes | None:
        """Do it; None if the instances keep what they had."""
        started = time.monotonic()
        self.do(lambda: self.update.begin(instances))
        await self._over.wait()
        if self.update.state is not UpdateState.DONE:
            return None
        ended = time.monotonic()
        return SwitchTimes(self._decided_at - started, ended - self._decided_at)

    def do(self, decide: Callable[[], Iterable[UpdateCommand]]) -> None:
        """Take an event and carry out what it causes; an error fails the update."""
        try:
            for command in decide():
                self._carry_out(command)
        except Exception as error:
            _log.exception("a weight update failed")
            self._fail(f"the update failed: {describe(error)}")
        if self.update.is_over:
            self._over.set()

    def _carry_out(self, command: UpdateCommand) -> None:
        update, pool = self.update, self._pool
        match command:
            case Prepare(i):
                asked = pool.prepare_weights(i, self._index)
                asked.add_done_callback(self._teller(update.prepared, i))
            case Commit(i):
                asked = pool.ask(i, "commit_weights")
                asked.add_done_callback(self._teller(update.committed, i))
            case Discard(i):
                pool.ask(i, "discard_weights").add_done_callback(_ignore)
            case Decide():
                self._decided_at = time.monotonic()
                pool.weights = self._new
            case Replace(i, why):
                _log.warning("instance %d is started again: %s", i, why)
                pool.replace(i, why)
            case TakeBack():
                pool.weights = self._old

    def _fail(self, why: str) -> None:
        """Nobody knows what the instances have now: all start again with the old."""
        self._pool.weights = self._old
        for instance_id in self.update.touched:
            self._pool.replace(instance_id, why)
        self.give_up(why)

    def give_up(self, why: str) -> None:
        """Fail the update, since nobody will answer any more."""
        if not self.update.is_over:
            self.update.state = UpdateState.FAILED
            self.update.error = why
        self._over.set()

    def _teller(
        self,
        tell: Callable[[InstanceId, str], list[UpdateCommand]],
        instance_id: InstanceId,
    ) -> Callable[[asyncio.Future[object]], None]:
        def answered(answer: asyncio.Future[object]) -> None:
            error = answer.exception()
            if not isinstance(error, InstanceLostError):  # `instance_down` tells of it
                self.do(lambda: tell(instance_id, str(error) if error else ""))

        return answered


def _is_ample(num_bytes: int, directory: Path) -> bool:
    """Whether as much again is free where a file is, and so of the memory."""
    return num_bytes <= min(free_bytes(directory), free_memory_bytes())


async def _describe(pool: InstancePool, instances: list[InstanceId]) -> ModelSpec:
    """What the model's checkpoint holds; all instances have the same model.

    Raises:
        EngineError: the first that lives does not say it, or none lives.
    """
    for instance_id in instances:
        try:
            said = await pool.ask(instance_id, "describe_weights")
        except InstanceLostError:
            continue
        return msgspec.convert(said, ModelSpec)
    raise EngineError(NO_INSTANCE)


def _ignore(answer: asyncio.Future[object]) -> None:
    """An instance that cannot even forget is lost, of which `instance_down` tells."""
    answer.exception()
