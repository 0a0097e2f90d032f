"""Instances that die, hang or never start: nothing is lost, nothing waits forever."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

import aseer
from aseer.core.columns import columns_of
from aseer.instance.messages import (
    TO_INSTANCE,
    Answer,
    Hello,
    Report,
)
from aseer.transport.base import PROTOCOL_VERSION
from aseer.transport.zeromq import connect_dealer
from aseer.types import ChunkId, ChunkProgress, InstanceLoad
from tests.integration.sims import config_of, content, groups_of

LONG = {"ignore_eos": True, "max_tokens": 400}


async def reference(groups: list[aseer.Group]) -> dict[str, object]:
    async with aseer.Engine(config_of(chunk_size=0)) as engine:
        return content([r async for r in engine.rollout(groups)])


async def test_a_killed_instance_costs_no_response_and_comes_back():
    groups = groups_of(8, **LONG)
    async with aseer.Engine(config_of()) as engine:
        victim = engine.instances[0].pid
        rollout = engine.rollout([*groups, *groups_of(9, n=1, max_tokens=2)[8:]])
        responses = []
        async for response in rollout:
            if not responses:
                os.kill(victim, signal.SIGKILL)
            responses.append(response)
        assert rollout.report.num_retries > 0
        again = [r async for r in engine.rollout(groups)]
        assert victim not in [i.pid for i in engine.instances]
    divided = [r for r in responses if r.group_id != "g8"]
    assert content(divided) == content(again) == await reference(groups)
    assert max(r.metrics.num_retries for r in responses) == 1


async def test_ends_are_seen_when_somebody_else_handles_sigchld():
    """As PyTorch's data loaders do from their first worker on."""
    groups = groups_of(8, **LONG)
    old = signal.getsignal(signal.SIGCHLD)
    try:
        async with aseer.Engine(config_of()) as engine:
            signal.signal(signal.SIGCHLD, lambda *_: None)
            os.kill(engine.instances[0].pid, signal.SIGKILL)
            assert len([r async for r in engine.rollout(groups)]) == 32
            again = [r async for r in engine.rollout(groups)]
            closing = time.monotonic()
        assert time.monotonic() - closing < 20
        assert len(again) == 32
    finally:
        signal.signal(signal.SIGCHLD, old or signal.SIG_DFL)


async def test_an_instance_that_falls_silent_is_replaced():
    groups = groups_of(6, **LONG)
    config = config_of(heartbeat_timeout_s=1.0)
    async with aseer.Engine(config) as engine:
        victim = engine.instances[0].pid
        responses = []
        async for response in engine.rollout([*groups, *groups_of(7, n=1)[6:]]):
            if not responses:
                os.kill(victim, signal.SIGSTOP)
            responses.append(response)
        assert len(responses) == 25


async def test_an_engine_that_makes_no_token_is_killed_for_it():
    """The process still answers, so that only the missing progress gives it away."""
    config = config_of(
        num_instances=1,
        stall_timeout_s=1.0,
        max_restarts=0,
        engine_args={"step_s": 3600.0},
    )
    started = time.monotonic()
    responses = []
    async with aseer.Engine(config) as engine:
        with pytest.raises(aseer.InstanceLostError, match="made no token for"):
            async for response in engine.rollout(groups_of(1)):
                responses.append(response)
    assert time.monotonic() - started < 15
    assert [r.finish_reason for r in responses] == ["error"] * 4


async def test_when_every_instance_is_lost_all_responses_come_and_then_the_error():
    # Nobody is to be blamed before the restarts are used up.
    config = config_of(
        max_restarts=2, max_request_retries=100, engine_args={"die_after_tokens": 300}
    )
    responses = []
    async with aseer.Engine(config) as engine:
        with pytest.raises(aseer.InstanceLostError, match=r"max_restarts=2.*status 13"):
            async for response in engine.rollout(groups_of(10, **LONG)):
                responses.append(response)
        assert len({r.request_id for r in responses}) == 40
        lost = [r for r in responses if r.finish_reason == "error"]
        assert lost
        assert any(r.token_ids for r in lost), "what was generated is not lost"
        with pytest.raises(aseer.EngineError, match="no instance"):
            async for _ in engine.rollout(groups_of(1)):
                pass


async def test_a_request_that_kills_its_engines_ends_as_an_error():
    config = config_of(
        num_instances=1,
        max_restarts=10,
        max_request_retries=1,
        engine_args={"die_after_tokens": 50},
    )
    responses = []
    async with aseer.Engine(config) as engine:
        with pytest.raises(aseer.RolloutError, match="lost 2 times while running"):
            async for response in engine.rollout(groups_of(1, n=1, **LONG)):
                responses.append(response)
        log = engine.log_paths[0]
    assert responses[0].finish_reason == "error"
    assert f"exited with status 13 (its log: {log}; " in responses[0].error


async def test_a_rollout_begun_while_the_only_instance_is_away_waits_for_it():
    async with aseer.Engine(config_of(num_instances=1)) as engine:
        os.kill(engine.instances[0].pid, signal.SIGKILL)
        while engine.instances:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        assert len([r async for r in engine.rollout(groups_of(2))]) == 8


async def test_a_bug_in_a_rollouts_decisions_ends_that_rollout_and_not_the_engine(
    monkeypatch,
):
    def cancel_group(self, group_id, now):
        raise ZeroDivisionError("not today")

    groups = groups_of(8, **LONG) + groups_of(9, n=1, max_tokens=2)[8:]
    async with aseer.Engine(config_of()) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("aseer.controller.Controller.cancel_group", cancel_group)
            rollout = engine.rollout(groups)
            with pytest.raises(
                aseer.RolloutError, match="failed: ZeroDivisionError: not"
            ):
                async for response in rollout:
                    assert response.group_id == "g8"
                    rollout.cancel("g0")
        again = content([r async for r in engine.rollout(groups_of(8))])
        victims = [i.pid for i in engine.instances]
    assert again == await reference(groups_of(8))
    assert len(victims) == 2


async def test_a_start_that_fails_says_why_at_once():
    config = config_of(engine_args={"fail_at_start": "no such model: foo"})
    started = time.monotonic()
    with pytest.raises(aseer.InstanceStartError) as error:
        async with aseer.Engine(config):
            pass
    assert "RuntimeError: no such model: foo" in str(error.value)
    assert "Traceback" in str(error.value), "the log's last lines"
    assert time.monotonic() - started < 15


async def test_a_start_that_hangs_ends_at_its_deadline():
    config = config_of(start_timeout_s=2.0, engine_args={"start_s": 600.0})
    with pytest.raises(aseer.InstanceStartError, match="start_timeout_s=2"):
        async with aseer.Engine(config):
            pass


async def test_unknown_engine_arguments_are_named():
    with pytest.raises(aseer.InstanceStartError, match="do not know \\['bogus'\\]"):
        async with aseer.Engine(config_of(engine_args={"bogus": 1})):
            pass


async def test_engines_import_nothing_from_the_working_directory(tmp_path, monkeypatch):
    for name in ("queue", "msgspec", "aseer"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not for you')\n")
    monkeypatch.chdir(tmp_path)
    async with aseer.Engine(config_of()) as engine:
        assert len([r async for r in engine.rollout(groups_of(2))]) == 8


@pytest.mark.parametrize("name", [b"0.1", b"nobody"])
async def test_nonsense_under_any_name_costs_at_most_an_instance(name):
    """From a stranger on the control socket; one takes instance 0's name."""
    groups = groups_of(6, **LONG)
    config = config_of(heartbeat_timeout_s=1.0)
    async with aseer.Engine(config) as engine:
        other = engine.instances[1].pid
        endpoint = f"ipc://{engine.log_paths[0].parent}/ctrl"
        hello = Hello(PROTOCOL_VERSION, engine.instances[1])
        odd = ChunkProgress(chunk_id=ChunkId(0), start=0, tokens=b"abc", logprobs=b"d")
        responses = []
        async with connect_dealer(endpoint, name, TO_INSTANCE, linger_ms=0) as dealer:
            async for response in engine.rollout(groups):
                if not responses:
                    await dealer._socket.send_multipart([b"", b"\xc1", b"?"])
                    await dealer.send(Answer(10**6, "to what?"))
                    await dealer.send(Report(columns_of([odd] * 3), InstanceLoad()))
                    await dealer.send(hello)
                responses.append(response)
        again = [r async for r in engine.rollout(groups)]
        assert other in [i.pid for i in engine.instances]
    assert content(responses) == content(again) == await reference(groups)
