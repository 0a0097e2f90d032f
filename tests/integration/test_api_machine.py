"""Whatever users do to an engine, in any order and at once: nothing hangs, nothing is
lost silently, and the engine serves on until it is closed.

Hypothesis makes programs of calls. Each call runs as a task of an event loop of its own
thread, or in a thread, while the next ones are made; at the end all must have ended,
every loop that ended normally must have had every response exactly once, equal requests
must have had equal tokens, and a plain rollout must still work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import aseer
from tests.integration.sims import config_of

if TYPE_CHECKING:
    from collections.abc import Coroutine

torch = pytest.importorskip("torch")

SHAPES = {"w": [2]}
LENGTHS = st.sampled_from([1, 40, 400])
CALL_TIMEOUT_S = 30.0
# What a call may end with. Everything else is a fault, time-outs above all.
EXPECTED = (
    aseer.RolloutInProgressError,
    aseer.RolloutClosedError,
    aseer.WeightUpdateError,
    aseer.EngineError,
    aseer.RolloutError,
)


class OnPurpose(Exception):
    """Raised in a loop's body."""


class Calls(RuleBasedStateMachine):
    """An engine, and calls that are under way."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        config = config_of(
            max_restarts=100,
            engine_args={"step_s": 0.0005, "weights": SHAPES},
        )
        self.engine = aseer.Engine(config)
        self.do(self.engine.__aenter__())
        self.tasks: list[asyncio.Task[Any]] = []
        self.threads: list[threading.Thread] = []
        self.faults: list[BaseException] = []
        self.contents: dict[tuple[int, str], list[int]] = {}
        self.closes = False

    # How calls are made

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run one to its end."""

        async def timed():
            async with asyncio.timeout(2 * CALL_TIMEOUT_S):
                return await coroutine

        return asyncio.run_coroutine_threadsafe(timed(), self.loop).result()

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Begin one, and go on."""

        async def noted():
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await coroutine
            except (*EXPECTED, OnPurpose, asyncio.CancelledError):
                pass
            except BaseException as error:
                self.faults.append(error)

        async def start():
            self.tasks.append(asyncio.get_running_loop().create_task(noted()))
            for _ in range(3):
                await asyncio.sleep(0)

        self.do(start())

    def groups(self, num: int, max_tokens: int) -> list[aseer.Group]:
        sampling = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
        return [
            aseer.Group([7, i], n=2, sampling=sampling, group_id=f"{max_tokens}-{i}")
            for i in range(num)
        ]

    def check(self, responses: list[aseer.Response], *, groups: int | None) -> None:
        """What a loop had; `groups` if it ended normally."""
        seen = Counter(r.request_id for r in responses)
        assert max(seen.values(), default=1) == 1, "a response came twice"
        if groups is not None:
            assert len(responses) == 2 * groups, "responses are missing"
        for r in responses:
            assert len(r.token_ids) == len(r.logprobs) == len(r.text)
            if r.finish_reason == "length":
                key = (r.weight_version, r.request_id)
                known = self.contents.setdefault(key, r.token_ids)
                assert known == r.token_ids, "what is sampled changed"

    # Rollouts

    @rule(
        num=st.integers(1, 6),
        max_tokens=LENGTHS,
        source=st.sampled_from(["list", "iterator", "async iterator"]),
        end=st.sampled_from(
            ["read", "break", "raise", "block", "keep", "cancel group"]
        ),
        after=st.integers(0, 3),
    )
    def roll(self, num, max_tokens, source, end, after):
        groups = self.groups(num, max_tokens)
        taken: list[aseer.Group] = groups if source == "list" else []

        def produce():
            for group in groups:
                taken.append(group)
                yield group

        async def produce_slowly():
            for group in groups:
                await asyncio.sleep(0.005)
                taken.append(group)
                yield group

        given = {"iterator": produce, "async iterator": produce_slowly}.get(source)

        async def loop():
            responses = []
            rollout = self.engine.rollout(groups if given is None else given())
            if end == "block":
                async with rollout:
                    async for response in rollout:
                        responses.append(response)
                        if len(responses) > after:
                            break
                return self.check(responses, groups=None)
            if end == "keep":
                iterator = aiter(rollout)
                for _ in range(after):
                    with suppress(StopAsyncIteration):
                        responses.append(await anext(iterator))
                await asyncio.sleep(0.05)
                return self.check(responses, groups=None)
            async for response in rollout:
                responses.append(response)
                if len(responses) > after:
                    if end == "break":
                        return self.check(responses, groups=None)
                    if end == "raise":
                        raise OnPurpose
                    if end == "cancel group":
                        rollout.cancel(response.group_id)
            # (An abort by others ends the taking of groups from iterators.)
            return self.check(responses, groups=len(taken))

        self.begin(loop())

    @rule(num=st.integers(1, 4), max_tokens=LENGTHS, early=st.booleans())
    def roll_in_a_thread(self, num, max_tokens, early):
        groups = self.groups(num, max_tokens)

        def loop():
            responses = []
            try:
                for response in self.engine.rollout_sync(groups):
                    responses.append(response)
                    if early:
                        break
                self.check(responses, groups=None if early else num)
            except EXPECTED:
                pass
            except BaseException as error:
                self.faults.append(error)

        thread = threading.Thread(target=loop)
        thread.start()
        self.threads.append(thread)

    @rule(which=st.integers(0, 9))
    def cancel_a_task(self, which):
        if self.tasks:
            task = self.tasks[which % len(self.tasks)]
            self.loop.call_soon_threadsafe(task.cancel)

    @rule()
    def abort(self):
        self.begin(self.engine.abort_rollout())

    # The engine

    @rule(
        pause=st.sampled_from([None, "wait", "abort"]),
        value=st.sampled_from([1.0, 2.0, float("nan")]),
    )
    def update(self, pause, value):
        weights = {"w": torch.full((2,), value)}
        self.begin(self.engine.update_weights(weights, pause=pause))

    @rule()
    def sleep(self):
        self.begin(self.engine.sleep())

    @rule()
    def wake(self):
        self.begin(self.engine.wake())

    @rule(
        which=st.integers(0, 1), how=st.sampled_from([signal.SIGKILL, signal.SIGSTOP])
    )
    def harm(self, which, how):
        instances = self.engine.instances
        if which < len(instances):
            pid = instances[which].pid
            with suppress(ProcessLookupError):
                os.kill(pid, how)
                if how == signal.SIGSTOP:
                    time.sleep(0.1)
                    os.kill(pid, signal.SIGCONT)

    @rule(now=st.sampled_from([True] + 7 * [False]))
    def close(self, now):
        """Seldom: what comes after it finds a closed engine, and is told so."""
        if now and not self.closes:
            self.closes = True
            self.begin(self.engine.aclose())

    @rule(pause_s=st.sampled_from([0.0, 0.02, 0.2]))
    def pass_time(self, pause_s):
        time.sleep(pause_s)

    def teardown(self) -> None:
        try:
            self.do(self._settle())
            for thread in self.threads:
                thread.join(CALL_TIMEOUT_S)
                assert not thread.is_alive(), "a thread hangs"
            assert not self.faults, self.faults
        finally:
            try:
                self.do(self.engine.aclose())
            finally:
                self.loop.call_soon_threadsafe(self.loop.stop)
                self.thread.join()
                self.loop.close()

    async def _settle(self) -> None:
        """Whatever was begun ends by itself, and then the engine does its work."""
        if not self.closes:
            await self.engine.wake()
        if self.tasks:
            await asyncio.wait(self.tasks)
        if self.closes:
            await self.engine.aclose()  # the first may have been cancelled
            with pytest.raises(aseer.EngineClosedError):
                await self.engine.update_weights({"w": torch.full((2,), 1.0)})
            return
        responses = None
        while responses is None:
            await self.engine.wake()
            await self.engine.abort_rollout()
            with suppress(aseer.RolloutInProgressError):  # a thread's, just begun
                rollout = self.engine.rollout(self.groups(2, 40))
                responses = [r async for r in rollout]
                if {r.finish_reason for r in responses} != {"length"}:
                    responses = None
        self.check(responses, groups=2)


@pytest.mark.timeout(300)
def test_any_program_of_calls_leaves_an_engine_that_serves():
    settings = hypothesis.settings(
        max_examples=12,
        stateful_step_count=12,
        deadline=None,
        # A program takes seconds; to shrink one would take minutes.
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(Calls, settings=settings)
