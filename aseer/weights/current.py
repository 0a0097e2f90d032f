"""The weights that updates brought to an engine: whole ones, adapters, or both.

Pure. An update brings either. Whole weights take the place of all that was there;
adapters stand on the whole weights that are there, and take other adapters' place.
Whole weights may have come straight from a trainer, and be in no file.
"""

from __future__ import annotations

from typing import NamedTuple


class TrainersWeights:
    """Weights that no file has: an instance that does not hold them cannot get them.

    Attributes:
        holders: identities of the processes that hold them.
        fingerprint: of the weights, for journals; no other run has the same.
    """

    def __init__(self, holders: frozenset[bytes], fingerprint: str) -> None:
        self.holders = holders
        self.fingerprint = fingerprint


class CurrentWeights(NamedTuple):
    """Paths of the updates' indexes.

    Attributes:
        whole: of the model's own tensors, or that they are in no file; None = they are
            the checkpoint's.
        adapters: that stand on them; None = there are none.
    """

    whole: str | TrainersWeights | None = None
    adapters: str | None = None

    def after(self, index: str, *, is_adapters: bool) -> CurrentWeights:
        """What they are after an update."""
        if is_adapters:
            return self._replace(adapters=index)
        return CurrentWeights(whole=index)

    @property
    def paths(self) -> set[str]:
        """Of the updates that are needed for them."""
        return {path for path in self if isinstance(path, str)}

    def way_to(self, wanted: CurrentWeights) -> list[str] | None:
        """What an instance that has these loads to have those, one after another.

        None = it cannot: neither a checkpoint's own weights nor a model without
        adapters can be loaded from anywhere but a start, nor what is in no file.
        """
        adapters = [wanted.adapters] if wanted.adapters is not None else []
        if wanted == self:
            return []
        if wanted.whole == self.whole and adapters:
            return adapters
        return [wanted.whole, *adapters] if isinstance(wanted.whole, str) else None
