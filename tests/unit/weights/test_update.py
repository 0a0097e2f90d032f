"""All instances switch or none does, whatever the order of answers and deaths."""

from __future__ import annotations

import random

import pytest

from aseer.errors import InvalidTransition
from aseer.types import InstanceId
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

A, B, C = map(InstanceId, range(3))


def prepared(*instances: InstanceId) -> WeightUpdate:
    update = WeightUpdate()
    assert update.begin(instances) == [Prepare(i) for i in instances]
    for i in instances:
        update.prepared(i, "")
    assert update.state is UpdateState.COMMITTING
    return update


def test_nothing_is_decided_before_the_last_has_prepared():
    update = WeightUpdate()
    update.begin([B, A])
    assert update.prepared(A, "") == []
    assert update.prepared(B, "") == [Decide(), Commit(A), Commit(B)]
    assert update.committed(B, "") == []
    assert not update.is_over
    assert update.committed(A, "") == []
    assert update.state is UpdateState.DONE


def test_one_refusal_ends_it_for_all_and_later_answers_are_nothing():
    update = WeightUpdate()
    update.begin([A, B])
    assert update.prepared(A, "too short") == [Discard(A), Discard(B)]
    assert update.state is UpdateState.FAILED
    assert "instance 0 refused the weights: too short" in update.error
    assert update.prepared(B, "") == []
    assert update.lost(B, "died") == []


def test_who_fails_to_switch_is_replaced_and_the_others_go_on():
    update = prepared(A, B)
    (replace,) = update.committed(A, "out of memory")
    assert replace == Replace(A, update.error)
    assert update.committed(B, "") == []
    assert update.state is UpdateState.DONE


def test_if_none_can_switch_the_decision_is_taken_back():
    update = prepared(A, B)
    assert [type(c) for c in update.committed(A, "bad")] == [Replace]
    assert [type(c) for c in update.committed(B, "bad")] == [Replace, TakeBack]
    assert update.state is UpdateState.FAILED


def test_a_death_before_the_decision_does_not_stop_the_others():
    update = WeightUpdate()
    update.begin([A, B])
    update.prepared(A, "")
    assert update.lost(B, "died") == [Decide(), Commit(A)]
    assert update.prepared(B, "") == []


def test_a_death_after_it_neither():
    update = prepared(A, B)
    update.committed(A, "")
    assert update.lost(B, "died") == []
    assert update.state is UpdateState.DONE


def test_when_all_die_it_has_failed():
    update = WeightUpdate()
    update.begin([A])
    update.lost(A, "died")
    assert update.state is UpdateState.FAILED
    update = prepared(A)
    assert update.lost(A, "died") == [TakeBack()]
    update = WeightUpdate()
    assert update.begin([]) == []
    assert update.state is UpdateState.FAILED


def test_who_comes_up_meanwhile_takes_part_or_has_the_new_weights_already():
    update = WeightUpdate()
    update.begin([A])
    assert update.joined(B) == [Prepare(B)]
    assert update.prepared(A, "") == []
    assert update.prepared(B, "") == [Decide(), Commit(A), Commit(B)]
    assert update.joined(C) == []
    update.committed(A, "bad")
    assert update.committed(B, "bad")[-1] == Replace(B, update.error)
    assert update.state is UpdateState.DONE, "C has the new weights"


def test_an_answer_out_of_turn_is_a_bug():
    update = WeightUpdate()
    update.begin([A])
    with pytest.raises(InvalidTransition):
        update.committed(A, "")


def test_no_mixture_of_weights_is_left_whatever_happens():
    """A model of instances that obey, fail and die at random."""
    for seed in range(500):
        rng = random.Random(seed)
        update = WeightUpdate()
        current, has = "old", dict.fromkeys((A, B, C), "old")
        todo, said = [], update.begin(has)
        while todo or said or not update.is_over:
            for command in said:  # in order; only answers come in any
                if isinstance(command, Decide):
                    current = "new"
                elif isinstance(command, TakeBack):
                    current = "old"
                else:
                    todo.append(command)
            said = []
            if not todo:
                continue
            command = todo.pop(rng.randrange(len(todo)))
            i = command.instance_id
            if isinstance(command, Replace) or has[i] is None:
                has[i] = None  # it starts again, with what is current then
            elif rng.random() < 0.1:
                has[i] = None
                said = update.lost(i, "died")
            elif isinstance(command, Prepare):
                said = update.prepared(i, rng.choice(["", "", "no"]))
            elif isinstance(command, Commit):
                error = rng.choice(["", "", "no"])
                has[i] = has[i] if error else "new"
                said = update.committed(i, error)
        left = {v or current for v in has.values()}
        assert left == {"new" if update.state is UpdateState.DONE else "old"}, seed
