"""One weight update over the instances, in two phases: events in, commands out.

    PREPARING --all prepared--> COMMITTING --one switched, none left--> DONE
        |                            |
        +--one refused-------------> FAILED <--none switched------------+

Nothing changes while instances prepare. Once all have, it is decided: an instance that
fails to switch, or dies, is started again and comes up with the new weights. Only if no
instance could switch is the decision taken back, and all come up with the old ones.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from aseer.errors import InvalidTransition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aseer.types import InstanceId


class UpdateState(StrEnum):
    """Where an update is; DONE and FAILED are final."""

    PREPARING = "preparing"
    COMMITTING = "committing"
    DONE = "done"
    FAILED = "failed"


class Prepare(NamedTuple):
    """Have an instance open the new weights and look at them."""

    instance_id: InstanceId


class Discard(NamedTuple):
    """Have an instance forget what it prepared."""

    instance_id: InstanceId


class Decide(NamedTuple):
    """From here on an instance that starts takes the new weights."""


class Commit(NamedTuple):
    """Have an instance switch to what it prepared."""

    instance_id: InstanceId


class Replace(NamedTuple):
    """Start an instance again: nobody knows what weights it has."""

    instance_id: InstanceId
    why: str


class TakeBack(NamedTuple):
    """From here on an instance that starts takes the old weights again."""


UpdateCommand = Prepare | Discard | Decide | Commit | Replace | TakeBack


class WeightUpdate:
    """The decisions of one update."""

    def __init__(self) -> None:
        self.state = UpdateState.PREPARING
        self.error = ""
        self._members: list[InstanceId] = []
        self._pending: set[InstanceId] = set()
        self._num_switched = 0

    @property
    def is_over(self) -> bool:
        return self.state in (UpdateState.DONE, UpdateState.FAILED)

    @property
    def touched(self) -> list[InstanceId]:
        """Instances that may have switched already."""
        return self._members if self.state is UpdateState.COMMITTING else []

    def begin(self, instances: Iterable[InstanceId]) -> list[UpdateCommand]:
        """Start with the instances that are up."""
        self._members = sorted(instances)
        self._pending = set(self._members)
        if not self._members:
            return self._fail("no instance is up")
        return [Prepare(i) for i in self._members]

    def joined(self, instance_id: InstanceId) -> list[UpdateCommand]:
        """An instance came up, with the weights that are current at this moment."""
        if self.state is UpdateState.COMMITTING:
            self._num_switched += 1
        if self.state is not UpdateState.PREPARING:
            return []
        self._members.append(instance_id)
        self._pending.add(instance_id)
        return [Prepare(instance_id)]

    def prepared(self, instance_id: InstanceId, error: str) -> list[UpdateCommand]:
        """An instance has looked at the new weights; empty `error` = they are fine."""
        if self.state is UpdateState.FAILED or instance_id not in self._members:
            return []
        self._expect(UpdateState.PREPARING, instance_id)
        if error:
            why = f"instance {instance_id} refused the weights: {error}"
            return [Discard(i) for i in self._members] + self._fail(why)
        self._pending.remove(instance_id)
        return self._commit_if_prepared()

    def committed(self, instance_id: InstanceId, error: str) -> list[UpdateCommand]:
        """An instance switched, or with an `error` did not."""
        if self.is_over or instance_id not in self._members:
            return []
        self._expect(UpdateState.COMMITTING, instance_id)
        self._pending.remove(instance_id)
        if not error:
            self._num_switched += 1
            return self._settle()
        self.error = f"instance {instance_id} could not load the weights: {error}"
        self._members.remove(instance_id)
        return [Replace(instance_id, self.error), *self._settle()]

    def lost(self, instance_id: InstanceId, why: str) -> list[UpdateCommand]:
        """An instance died."""
        if self.is_over or instance_id not in self._members:
            return []
        self._members.remove(instance_id)
        self._pending.discard(instance_id)
        self.error = f"instance {instance_id} was lost: {why}"
        if self.state is UpdateState.COMMITTING:
            return self._settle()
        if not self._members:
            return self._fail(self.error)
        return self._commit_if_prepared()

    def _commit_if_prepared(self) -> list[UpdateCommand]:
        if self._pending:
            return []
        self.state = UpdateState.COMMITTING
        self._pending = set(self._members)
        return [Decide(), *(Commit(i) for i in self._members)]

    def _settle(self) -> list[UpdateCommand]:
        if self._pending:
            return []
        if self._num_switched:
            self.state = UpdateState.DONE
            return []
        return [TakeBack(), *self._fail(self.error)]

    def _fail(self, why: str) -> list[UpdateCommand]:
        self.state = UpdateState.FAILED
        self.error = why
        return []

    def _expect(self, state: UpdateState, instance_id: InstanceId) -> None:
        if self.state is not state or instance_id not in self._pending:
            raise InvalidTransition(
                f"instance {instance_id} answered out of turn; the weight update is "
                f"{self.state}, waiting for {sorted(self._pending)}"
            )
