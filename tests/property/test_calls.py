"""A controller's log makes its decisions again, and shows one that has changed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from aseer.errors import ConfigError
from aseer.policies import POLICIES
from aseer.runtime.calls import LoggedController, Settings, replay
from aseer.types import GroupId, InstanceId
from tests.property.test_controller_machine import NUM_INSTANCES, ControllerMachine
from tests.unit.builders import chunks_in, info_of, report_of, task_of

if TYPE_CHECKING:
    from aseer.controller import Controller


class LoggedMachine(ControllerMachine):
    """Whatever happens to a controller, its log says so."""

    def new_controller(self, **values: Any) -> Controller:
        self.log = io.BytesIO()
        return LoggedController(Settings(**values), self.log.write)

    @rule(price=st.none() | st.floats(0, 1))
    def a_move_is_priced(self, price: float | None) -> None:
        self.controller.set_move_price(price)

    @rule(num_pools=st.integers(1, NUM_INSTANCES))
    def a_pool_is_found(self, num_pools: int) -> None:
        self.controller.use_pool(4, lambda instance_id: instance_id % num_pools)

    @rule()
    def a_call_fails(self) -> None:
        with pytest.raises(KeyError):
            self.controller.cancel_group(GroupId("unknown"), self.now)
        if self.tasks:
            with pytest.raises(ValueError, match="in this rollout already"):
                self.controller.add_groups(list(self.tasks.values())[:1], self.now)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "log"):
            self.log.seek(0)
            done = replay(self.log)
            assert done.difference == ""
            assert not done.is_cut
            assert done.num_commands >= len(self.responses)


LoggedMachine.TestCase.settings = settings(
    max_examples=settings.default.max_examples // 3, stateful_step_count=30
)
TestLoggedMachine = LoggedMachine.TestCase


def log_of_a_rollout() -> bytes:
    """Of two groups on two instances, with something that is not plain data."""
    log = io.BytesIO()
    made = Settings(policy="context-aware", chunk_size=8)
    controller = LoggedController(made, log.write)
    for i in range(2):
        controller.instance_up(info_of(i, num_kv_blocks=9), 0.0)
    tasks = [task_of(g, num_requests=3, metadata=object()) for g in "gh"]
    commands = controller.add_groups(iter(tasks), 0.0)
    now = 0.0
    while chunks := chunks_in(commands):
        now += 1.0
        end = "stop" if now > 3 else "length"
        reports = [report_of(c.chunk_id, range(c.max_tokens), end=end) for c in chunks]
        commands = controller.progress(iter(reports), now)
    assert not controller.num_unfinished
    return log.getvalue()


def test_a_changed_decision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of_a_rollout()
    assert replay(io.BytesIO(log)).difference == ""
    monkeypatch.setitem(POLICIES, "context-aware", POLICIES["fcfs"])
    difference = replay(io.BytesIO(log)).difference
    assert difference.startswith(
        "call 3, AddGroups, command 2: it was ['dispatch', 'h/0'"
    )
    assert "and now is ['dispatch', 'g/1'" in difference


def test_a_log_that_was_cut_is_made_again_as_far_as_it_goes() -> None:
    log = log_of_a_rollout()
    whole = replay(io.BytesIO(log))
    done = replay(io.BytesIO(log[:-1]))
    assert (done.difference, done.is_cut) == ("", True)
    assert done.num_calls == whole.num_calls - 1


@pytest.mark.parametrize("data", [b"", b"\0\0", b"\0\0\0\1\xc0", b"no log of calls"])
def test_what_is_no_log_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="log of calls"):
        replay(io.BytesIO(data))


def test_an_engines_late_words_are_logged_too() -> None:
    log = io.BytesIO()
    made = Settings(policy="fcfs", chunk_size=8)
    controller = LoggedController(made, log.write)
    controller.progress([report_of(99, [1], end="stop")], 1.0)
    controller.instance_down(InstanceId(3), 2.0, "never was up")
    controller.instance_left(InstanceId(3), 2.0, "nor its node")
    log.seek(0)
    assert replay(log).num_calls == 3
