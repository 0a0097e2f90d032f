"""A process that the user forked has no engine: it is told so, and disturbs nothing."""

from __future__ import annotations

import os
import signal
import warnings
from typing import TYPE_CHECKING

import aseer
from tests.integration.sims import config_of, groups_of

if TYPE_CHECKING:
    from collections.abc import Callable

# A fork that waits for what never comes is killed after this time.
PATIENCE_S = 20


def said_in_a_fork(calls: list[Callable[[], object]]) -> list[str]:
    """What each call raises in a process forked from this one."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads beside a fork
        fork = os.fork()
    if fork == 0:
        try:
            signal.alarm(PATIENCE_S)
            for call in calls:
                try:
                    call()
                    said = "nothing"
                except aseer.AseerError as error:
                    said = f"{type(error).__name__}: {error}"
                os.write(writer, f"{said}\n".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        said = lines.read().splitlines()
    assert os.waitpid(fork, 0) == (fork, 0), "it waited for what never comes"
    return said


def test_a_fork_is_told_whose_the_engine_is_and_ends_nothing_of_it():
    with aseer.Engine(config_of()) as engine:
        with engine.rollout_sync(groups_of(4)) as rollout:
            responses = iter(rollout)
            first = next(responses)
            refused: list[Callable[[], object]] = [
                lambda: next(responses),
                lambda: rollout.cancel("g0"),
                lambda: list(engine.rollout_sync(groups_of(1))),
                lambda: engine.weight_version,
                lambda: engine.update_weights_sync({}),
                engine.abort_rollout_sync,
                engine.__enter__,
            ]
            said = said_in_a_fork([*refused, rollout.close, engine.close])
            words = f"EngineClosedError: the engine is open in process {os.getpid()}"
            assert all(each.startswith(words) for each in said[: len(refused)]), said
            assert said[len(refused) :] == ["nothing", "nothing"]
            assert len([first, *responses]) == 16
        assert len(list(engine.rollout_sync(groups_of(1)))) == 4
