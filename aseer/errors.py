"""Every error aseer raises on purpose.

    AseerError
    |-- ConfigError (also ValueError)        a setting or a group that cannot work
    |-- EngineError
    |   |-- InstanceStartError               an engine process did not come up
    |   |-- InstanceLostError                no instance is left that could do the work
    |   `-- EngineClosedError                the engine is not open (any more)
    |-- WeightUpdateError                    new weights were refused; the old ones stay
    |-- RolloutError                         requests of a rollout, or its decisions,
    |                                        failed; what was generated was yielded
    |-- RolloutInProgressError               an engine runs one rollout at a time
    |-- RolloutClosedError                   the rollout was left before its end
    |-- ProtocolError                        a message is malformed or too large
    `-- InvalidTransition                    a bug in aseer: a request's impossible move

Bad input raises at the edge, before anything runs; what was already generated is always
yielded before an error that ends a rollout.
"""

from __future__ import annotations


class AseerError(Exception):
    """Base of every error aseer raises on purpose."""


class ConfigError(AseerError, ValueError):
    """A setting, a group or a sampling parameter that cannot work."""


class EngineError(AseerError):
    """The engine, or one of its instances, failed."""


class InstanceStartError(EngineError):
    """An instance did not come up; the message has the cause and the log's end."""


class InstanceLostError(EngineError):
    """No instance is left that could finish the work."""


class EngineClosedError(EngineError):
    """The engine is not open, or was closed while a rollout ran."""


class RolloutError(AseerError):
    """Some requests ended in an error, or the rollout's decisions failed.

    Raised after every Response was yielded; the engine can run the next rollout.
    """


class RolloutInProgressError(AseerError):
    """The engine is still busy with another rollout."""


class RolloutClosedError(AseerError):
    """The rollout was left before its end; there is nothing more to read."""


class WeightUpdateError(AseerError):
    """New weights were refused; every instance has the weights it had before."""


class ProtocolError(AseerError):
    """A message between processes is malformed, or larger than a receiver takes."""


class InvalidTransition(AseerError):
    """A request was asked to make a move its state does not allow (a bug in aseer)."""


def root_of(error: BaseException) -> BaseException:
    """The error worth telling of a task group's bundle: aseer's own if there is one."""
    while isinstance(error, BaseExceptionGroup):
        error = (error.subgroup(AseerError) or error).exceptions[0]
    return error


def describe(error: BaseException) -> str:
    """The root of an error in words: its type, and its text, or else its cause."""
    error = root_of(error)
    name, text = type(error).__name__, str(error)
    if not text and error.__cause__ is not None:
        text = describe(error.__cause__)
    return f"{name}: {text}" if text else name
