"""The pool's owner hears what happens, in order; an instance's end is only its own."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest

from aseer.errors import EngineError, InstanceLostError, InstanceStartError
from aseer.instance.messages import TO_INSTANCE, Failed, Hello, Run
from aseer.transport.memory import Faults
from aseer.types import InstanceId
from aseer.weights.current import CurrentWeights
from tests.unit.runtime.machine import (
    Exited,
    Running,
    chunk_of,
    config_of,
    machine_of,
    running,
)

if TYPE_CHECKING:
    from tests.unit.runtime.machine import Machine

A, B = InstanceId(0), InstanceId(1)


async def start_error(machine: Machine, **settings: object) -> BaseException:
    """Why a pool does not start."""
    run = Running(machine, config_of(**settings))
    async with asyncio.TaskGroup() as tasks:
        talking = tasks.create_task(
            machine.router.run(run.pool.on_message, run.pool.on_lost)
        )
        try:
            await run.pool.start()
        except BaseExceptionGroup as group:
            (error,) = group.exceptions
            return error
        finally:
            await run.pool.stop(0)
            talking.cancel()
    raise AssertionError("it started")


# Starting


async def test_all_are_up_once_the_pool_has_started(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        assert sorted(run.owner.infos) == [A, B]
        assert [run.pool.num_restarts(i) for i in (A, B)] == [0, 0]
        assert await run.run_to_its_end(1, B) == "length"
        assert run.pool.is_idle
    assert all(p.has_ended for p in run.machine.processes.values())


async def test_one_that_cannot_start_ends_the_start_with_its_own_words(
    monkeypatch,
) -> None:
    async with machine_of(monkeypatch) as machine:
        machine.fail("1.1", "start", RuntimeError("no such model"))
        error = await start_error(machine)
        assert isinstance(error, InstanceStartError)
        assert "instance 1 (a test) exited with status 1" in str(error)
        assert "cause: RuntimeError: no such model" in str(error)
        assert "the last line" in str(error)
        assert all(p.has_ended for p in machine.processes.values())


async def test_one_that_takes_too_long_to_start_is_ended(monkeypatch) -> None:
    async with machine_of(monkeypatch) as machine:
        machine.hold("0.1", "start")
        error = await start_error(machine, start_timeout_s=0.05)
        assert "was not ready after start_timeout_s=0.05" in str(error)
        assert machine.processes["0.1"].has_ended


async def test_no_room_for_a_process_is_the_starts_error(monkeypatch) -> None:
    async with machine_of(monkeypatch) as machine:
        machine.num_refused_starts = 1
        error = await start_error(machine, num_instances=1)
        assert "no room for a process" in str(error)


async def test_another_version_of_the_protocol_is_refused_in_words(monkeypatch) -> None:
    async with machine_of(monkeypatch) as machine:
        machine.protocol = 99
        error = await start_error(machine, num_instances=1)
        assert "another version of aseer" in str(error)


async def test_a_hello_that_makes_no_sense_is_refused(monkeypatch) -> None:
    async with machine_of(monkeypatch) as machine:
        run = Running(machine, config_of(num_instances=1), max_num_seqs=0)
        async with asyncio.TaskGroup() as tasks:
            talking = tasks.create_task(machine.router.run(run.pool.on_message))
            with pytest.raises(ExceptionGroup) as caught:
                await run.pool.start()
            talking.cancel()
        assert "makes no sense" in str(caught.value.exceptions[0])
        assert run.owner.told == []


# Dying


async def test_a_dead_instance_is_down_and_then_up_again(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        run.process("0.1").kill()
        await run.until(("down", 0), ("up", 0))
        assert run.owner.kinds() == [("down", 0), ("up", 0)]
        assert "SIGKILL" in run.owner.whys()[0]
        assert run.pool.num_restarts(A) == 1
        assert await run.run_to_its_end(1) == "length"


async def test_what_a_dead_instance_was_asked_and_ran_is_over(monkeypatch) -> None:
    async with running(monkeypatch, config_of(max_restarts=0)) as run:
        run.machine.hold("0.1", "sleep")
        asked = [run.pool.ask(A, "sleep", level=1) for _ in range(3)]
        run.pool.run_chunk(A, Run(chunk_of(1, max_tokens=10**6)))
        assert not run.pool.is_idle
        run.process("0.1").kill()
        await run.until(("down", 0))
        for each in asked:
            with pytest.raises(InstanceLostError):
                await each
        assert run.pool.is_idle
        with pytest.raises(InstanceLostError, match="down"):
            await run.pool.ask(A, "wake")


async def test_last_words_of_a_dead_incarnation_are_dropped(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        run.process("0.1").kill()
        await run.until(("down", 0), ("up", 0))
        run.owner.told.clear()
        with run.machine.router.connect(b"0.1", TO_INSTANCE) as late:
            await late.send(Hello(99, run.owner.infos[A]))
            await late.send(Failed("too late"))
            assert await run.run_to_its_end(7) == "length"
        assert run.owner.told == []


async def test_a_second_hello_changes_nothing(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        run.pool.on_message(b"0.1", Hello(run.machine.protocol, run.owner.infos[A]))
        assert await run.run_to_its_end(1) == "length"
        assert run.owner.told == []


async def test_an_instance_dies_of_its_own_cause(monkeypatch) -> None:
    async with running(monkeypatch, config_of(max_restarts=0)) as run:
        run.machine.fail("0.1", "sleep", Exited())
        with pytest.raises(InstanceLostError, match="exited with status 13"):
            await run.pool.ask(A, "sleep", level=1)
        await run.until(("down", 0))


async def test_a_start_that_fails_is_tried_again_while_restarts_are_left(
    monkeypatch,
) -> None:
    async with running(monkeypatch, config_of(max_restarts=3)) as run:
        run.machine.fail("0.3", "start", RuntimeError("not yet"))
        run.machine.num_refused_starts = 1
        run.process("0.1").kill()
        await run.until(("down", 0), ("up", 0))
        assert run.owner.kinds() == [("down", 0), ("up", 0)]
        assert run.pool.num_restarts(A) == 3


NO_MEMORY = RuntimeError(
    "Free memory on device cuda:0 (2.1/79.1 GiB) on startup is less than desired GPU "
    "memory utilization (0.9, 71.2 GiB)."
)


async def test_a_start_that_lacks_device_memory_waits_and_costs_no_restart(
    monkeypatch,
) -> None:
    monkeypatch.setattr("aseer.runtime.supervisor._MEMORY_PAUSE_S", 0.001)
    async with running(monkeypatch, config_of(max_restarts=1)) as run:
        for incarnation in range(2, 8):
            run.machine.fail(f"0.{incarnation}", "start", NO_MEMORY)
        run.process("0.1").kill()
        await run.until(("down", 0), ("up", 0))
        assert run.pool.num_restarts(A) == 7
        assert run.owner.kinds() == [("down", 0), ("up", 0)]


async def test_waiting_for_device_memory_has_an_end(monkeypatch) -> None:
    monkeypatch.setattr("aseer.runtime.supervisor._MEMORY_PATIENCE_S", 0.0)
    config = config_of(max_restarts=2, num_instances=1)
    async with running(monkeypatch, config) as run:
        run.machine.fail("*", "start", NO_MEMORY)
        run.process("0.1").kill()
        await run.machine.until(lambda: "exhausted" in str(run.owner.told))
        assert run.pool.num_restarts(A) == 2


async def test_questions_for_an_instance_that_is_starting_are_answered_at_once(
    monkeypatch,
) -> None:
    async with running(monkeypatch) as run:
        go_on = run.machine.hold("0.2", "start")
        run.process("0.1").kill()
        await run.machine.until_asked("0.2", "start")
        with pytest.raises(InstanceLostError, match="is down"):
            await run.pool.ask(A, "sleep", level=1)
        go_on.set()
        await run.until(("down", 0), ("up", 0))


# Restarts


async def test_when_restarts_are_used_up_the_others_go_on(monkeypatch) -> None:
    async with running(monkeypatch, config_of(max_restarts=1)) as run:
        run.process("0.1").kill()
        await run.machine.until(lambda: run.owner.kinds().count(("up", 0)) == 1)
        run.process("0.2").kill()
        await run.machine.until(lambda: run.owner.kinds().count(("down", 0)) == 2)
        assert await run.run_to_its_end(1, B) == "length"
        assert ("exhausted",) not in run.owner.kinds()
        run.process("1.1").kill()
        await run.until(("exhausted",))
        assert run.owner.kinds()[-2:] == [("down", 1), ("exhausted",)]
        assert "max_restarts=1 are used up" in run.owner.whys()[-1]


async def test_forgiveness_wakes_one_that_was_given_up(monkeypatch) -> None:
    async with running(monkeypatch, config_of(max_restarts=0)) as run:
        run.process("0.1").kill()
        await run.until(("down", 0))
        assert "0.2" not in run.machine.processes
        run.pool.forgive(1)
        await run.machine.until(lambda: run.owner.kinds().count(("up", 0)) == 1)
        assert ("exhausted",) not in run.owner.kinds()


async def test_one_forgiven_death_brings_one_of_two_back_and_a_second_the_other(
    monkeypatch,
) -> None:
    config = config_of(max_restarts=0, num_instances=3)
    async with running(monkeypatch, config) as run:
        run.process("0.1").kill()
        run.process("1.1").kill()
        await run.until(("down", 0), ("down", 1))
        for num in (1, 2):
            run.pool.forgive(1)
            await run.machine.until(
                lambda num=num: sum(k[0] == "up" for k in run.owner.kinds()) == num
            )
        assert ("exhausted",) not in run.owner.kinds()


async def test_a_replaced_instance_costs_no_restart(monkeypatch) -> None:
    async with running(monkeypatch, config_of(max_restarts=0)) as run:
        for incarnation in (1, 2, 3):
            run.pool.replace(A, "for a test")
            await run.machine.until(
                lambda n=incarnation: run.owner.kinds().count(("up", 0)) == n
            )
        assert (
            run.owner.whys()
            == [
                "for a test (its log: /nowhere/instance-0.log; "
                "EngineConfig.log_dir keeps it)"
            ]
            * 3
        )


async def test_an_instance_that_is_replaced_while_it_starts_again_costs_nothing_either(
    monkeypatch,
) -> None:
    async with running(monkeypatch, config_of(max_restarts=1)) as run:
        run.machine.hold("0.2", "start")
        run.process("0.1").kill()
        await run.machine.until_asked("0.2", "start")
        run.pool.replace(A, "for a test")
        await run.machine.until(lambda: run.owner.kinds().count(("up", 0)) == 1)
        assert "0.3" in run.machine.processes


async def test_nothing_starts_while_starts_are_held(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        run.pool.hold_starts()
        run.process("0.1").kill()
        await run.until(("down", 0))
        assert await run.run_to_its_end(1, B) == "length"
        assert "0.2" not in run.machine.processes
        run.pool.allow_starts()
        await run.machine.until(lambda: run.owner.kinds().count(("up", 0)) == 1)


# Weights that a new instance must load first


async def test_a_new_instance_is_up_with_the_current_weights(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        run.pool.weights = CurrentWeights("new")
        run.process("0.1").kill()
        await run.until(("down", 0), ("up", 0))
        assert run.process("0.2").backend.weights == "new"


async def test_weights_that_change_while_an_instance_loads_them_are_loaded_again(
    monkeypatch,
) -> None:
    async with running(monkeypatch) as run:
        run.pool.weights = CurrentWeights("new")
        go_on = run.machine.hold("0.2", "prepare_weights")
        run.process("0.1").kill()
        await run.machine.until_asked("0.2", "prepare_weights")
        run.pool.weights = CurrentWeights("newer")
        go_on.set()
        await run.until(("down", 0), ("up", 0))
        assert run.process("0.2").backend.weights == "newer"


async def test_weights_taken_back_while_an_instance_loads_them_cost_no_restart(
    monkeypatch,
) -> None:
    async with running(monkeypatch, config_of(max_restarts=1)) as run:
        run.pool.weights = CurrentWeights("new")
        go_on = run.machine.hold("0.2", "commit_weights")
        run.process("0.1").kill()  # which takes the only restart
        await run.machine.until_asked("0.2", "commit_weights")
        run.pool.weights = CurrentWeights()
        go_on.set()
        await run.machine.until(lambda: run.owner.kinds().count(("up", 0)) == 1)
        assert run.process("0.3").backend.weights == ""


async def test_an_instance_that_cannot_load_the_weights_is_tried_again(
    monkeypatch, caplog
) -> None:
    async with running(monkeypatch, config_of(max_restarts=2)) as run:
        run.pool.weights = CurrentWeights("new")
        run.machine.fail("0.2", "prepare_weights", RuntimeError("cannot map it"))
        run.process("0.1").kill()
        await run.machine.until(lambda: run.owner.kinds().count(("up", 0)) == 1)
        assert run.process("0.3").backend.weights == "new"
        assert "cause: RuntimeError: cannot map it" in caplog.text


# Watching


async def test_a_silent_instance_is_killed(monkeypatch) -> None:
    config = config_of(heartbeat_timeout_s=0.1, report_interval_s=0.02)
    async with running(monkeypatch, config) as run:
        dealer = run.machine.router._dealers[b"0.1"]
        dealer.up.faults = Faults(Random(0), drop=1.0)
        await run.until(("down", 0), ("up", 0))
        assert "it was silent for" in run.owner.whys()[0]


async def test_a_living_instance_that_lost_what_was_sent_to_it_is_started_again(
    monkeypatch,
) -> None:
    async with running(monkeypatch) as run:
        router = run.machine.router
        with monkeypatch.context() as patch:  # it reports, but is not reached
            patch.setattr(router, "_try_send", lambda *message: "gone")
            run.pool.run_chunk(A, Run(chunk_of(1)))
            await run.machine.until(lambda: not router._queues)
        await run.until(("down", 0), ("up", 0))
        assert "its connection broke" in run.owner.whys()[0]
        assert await run.run_to_its_end(2) == "length"


async def test_what_is_lost_with_a_dying_instance_is_not_the_cause_of_its_death(
    monkeypatch,
) -> None:
    async with running(monkeypatch) as run:
        # On a busy machine a death may take longer to be seen than 5 ms.
        run.pool._supervisor._watch_interval_s = 10.0
        run.process("0.1").kill()
        await asyncio.wait([run.process("0.1")._task])
        # On a busy machine this loop may be late to hear of the process's end.
        run.pool._watch_interval_s = 10.0
        run.pool.run_chunk(A, Run(chunk_of(1)))
        await run.until(("down", 0), ("up", 0))
        assert "SIGKILL" in run.owner.whys()[0]
        assert run.pool.is_idle


async def test_an_instance_that_makes_no_token_is_killed(monkeypatch) -> None:
    config = config_of(stall_timeout_s=0.1)
    async with running(monkeypatch, config, max_num_seqs=1) as run:
        stuck = run.process("0.1").backend
        stuck._slots = asyncio.Semaphore(0)
        run.pool.run_chunk(A, Run(chunk_of(1)))
        await run.until(("down", 0), ("up", 0))
        assert "made no token for" in run.owner.whys()[0]
        assert await run.run_to_its_end(2) == "length"


async def test_an_idle_instance_is_not_stuck(monkeypatch) -> None:
    async with running(monkeypatch, config_of(stall_timeout_s=0.02)) as run:
        before = len(run.owner.reports)
        await run.machine.until(lambda: len(run.owner.reports) > before + 20)
        assert run.owner.told == []


async def test_an_unanswered_question_ends_its_instance(monkeypatch) -> None:
    async with running(monkeypatch, config_of(start_timeout_s=0.2)) as run:
        run.machine.hold("0.1", "sleep")
        with pytest.raises(InstanceLostError, match="left a question unanswered"):
            await run.pool.ask(A, "sleep", level=1)


async def test_an_answer_is_the_askers_and_so_is_an_error(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        run.machine.fail("0.1", "wake", RuntimeError("no"))
        asked = [run.pool.ask(A, "describe_weights"), run.pool.ask(A, "wake")]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers[1], EngineError)
        assert "RuntimeError: no" in str(answers[1])
        assert not isinstance(answers[0], BaseException)
        assert await run.run_to_its_end(1) == "length"


async def test_an_instance_that_speaks_nonsense_is_replaced(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        run.pool.on_lost(b"0.1", "it speaks nonsense")
        await run.until(("down", 0), ("up", 0))
        assert "it speaks nonsense" in run.owner.whys()[0]
        run.pool.on_lost(b"0.1", "that was long ago")
        run.pool.on_lost(b"nobody", "who")
        assert await run.run_to_its_end(1) == "length"


async def test_only_busy_instances_are_killed_for_being_busy(monkeypatch) -> None:
    async with running(monkeypatch, step_s=0.001) as run:
        run.pool.run_chunk(A, Run(chunk_of(1, max_tokens=10**6)))
        run.pool.kill_busy("it did not stop")
        await run.until(("down", 0), ("up", 0))
        assert ("down", 1) not in run.owner.kinds()


async def test_all_that_runs_is_aborted_whoever_it_is_for(monkeypatch) -> None:
    async with running(monkeypatch, step_s=0.001) as run:
        for i in range(4):
            run.pool.run_chunk(A if i % 2 else B, Run(chunk_of(i, max_tokens=10**6)))
        before = len(run.owner.reports)
        await run.machine.until(lambda: len(run.owner.reports) > before + 4)
        run.pool.abort_all()
        await run.machine.until(lambda: run.pool.is_idle)
        assert run.ends() == dict.fromkeys(range(4), "aborted")


@pytest.mark.parametrize("when", ["it runs", "it starts"])
async def test_nobody_waits_for_a_process_that_cannot_be_killed(
    monkeypatch, when
) -> None:
    monkeypatch.setattr("aseer.runtime.deaths.LONGEST_DEATH_S", 0.2)
    monkeypatch.setattr("aseer.runtime.deaths._LAST_LOOK_S", 0.05)
    config = config_of(start_timeout_s=1.0)
    async with running(monkeypatch, config) as run, asyncio.timeout(20):
        if when == "it starts":
            run.machine.hold("0.2", "start")
            run.process("0.1").kill()
            await run.machine.until_asked("0.2", "start")
        undead = run.process("0.1" if when == "it runs" else "0.2")
        kill = undead.kill
        with monkeypatch.context() as patch:
            patch.setattr(undead, "kill", lambda: None)
            if when == "it runs":
                run.pool.run_chunk(A, Run(chunk_of(1, A, max_tokens=10**6)))
                run.pool.kill_busy("it made no token")
            await run.until(("down", A), ("up", A))
            assert await run.run_to_its_end(2, A) == "length"
            assert not undead.has_ended
            if when == "it runs":
                (why,) = run.owner.whys()
                assert why.startswith("it made no token")
                assert "it was killed, and lives on" in why
            await run.pool.stop(1.0)
        kill()


async def test_a_chunk_that_cannot_be_sent_keeps_no_instance_busy(monkeypatch) -> None:
    async with running(monkeypatch) as run:
        bad = chunk_of(1, A)
        object.__setattr__(bad, "group_id", "\ud800")
        with pytest.raises(UnicodeEncodeError):
            run.pool.run_chunk(A, Run(bad))
        assert run.pool.is_idle
        assert await run.run_to_its_end(2, A) == "length"
