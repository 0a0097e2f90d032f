"""What an engine samples with, as a journal knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aseer.journal.history import Weights
from aseer.weights.current import TrainersWeights
from aseer.weights.fingerprint import (
    describe_model,
    fingerprint_of_model,
    fingerprint_of_update,
)

if TYPE_CHECKING:
    from aseer.config import EngineConfig
    from aseer.types import InstanceInfo
    from aseer.weights.current import CurrentWeights


class Identity(NamedTuple):
    """What samples: what a journal is compared with.

    Attributes:
        model: what tells models apart, by name; values in words.
        repeats: whether engines that start draw the same random numbers as before.
    """

    model: dict[str, str]
    weights: Weights
    repeats: bool


class Identifier:
    """Knows an engine's identity; what is slow to find out is found out once."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._known: tuple[CurrentWeights, str] | None = None

    def identify(
        self, info: InstanceInfo, version: int, weights: CurrentWeights
    ) -> Identity:
        """The engine's identity, as long as it has these weights.

        Reads all bytes of an update's weights the first time: some seconds for 10 GB on
        one core, in up to eight threads.

        Args:
            version: of the weights.
            weights: what updates brought.
        """
        if self._known is None or self._known[0] != weights:
            self._known = (weights, self._fingerprint(weights))
        return Identity(
            model=describe_model(self._config, info),
            weights=Weights(version, self._known[1]),
            repeats=self._config.seed is not None,
        )

    def _fingerprint(self, weights: CurrentWeights) -> str:
        if isinstance(weights.whole, TrainersWeights):
            found = weights.whole.fingerprint
        elif weights.whole is None:
            found = fingerprint_of_model(self._config)
        else:
            found = fingerprint_of_update(weights.whole)
        if weights.adapters is not None:
            found += f"+{fingerprint_of_update(weights.adapters)}"
        return found
