"""The budget as traces: step times and confidences in, draft lengths out."""

from __future__ import annotations

import numpy as np
import pytest

from aseer.dgds.budget import (
    AdaptiveBudget,
    Candidates,
    FixedBudget,
    PaperBudget,
    make_budget,
    spend,
)
from aseer.dgds.steptime import StepTimeModel
from aseer.inputs.speculation import SpeculationConfig


def candidates(rows: list[list[float]], weights: list[float] | None = None):
    return Candidates(
        confidences=np.array([c for row in rows for c in row], np.float32),
        offsets=np.cumsum([0, *map(len, rows)]),
        weights=np.array(weights or [1.0] * len(rows)),
        num_context_tokens=100 * len(rows),
    )


def lengths(
    rows: list[list[float]], step_s: list[float], weights: list[float] | None = None
) -> list[int]:
    c = candidates(rows, weights)
    chosen = spend(c.confidences.astype(float), c.offsets, c.weights, np.array(step_s))
    return chosen.lengths.tolist()


def model_of(step_s, sizes=(1, 2, 4, 8, 16, 32, 64, 128)) -> StepTimeModel:
    """A model that has seen steps of `step_s(rows, drafted)` seconds."""
    model = StepTimeModel()
    for _ in range(20):
        for rows in sizes:
            for drafted in (0, rows, 4 * rows):
                model.observe(rows, drafted, 100 * rows, step_s(rows, drafted))
    return model


def test_where_tokens_cost_no_time_all_are_drafted():
    assert lengths([[0.9, 0.5], [0.3]], [1.0] * 4) == [2, 1]


def test_where_a_token_costs_what_a_row_costs_none_is():
    assert lengths([[0.9, 0.8], [0.9]], [2.0, 3.0, 4.0, 5.0]) == [0, 0]


def test_likelier_tokens_go_first_whichever_row_they_are_in():
    # Two tokens are free, the third is not.
    assert lengths([[0.9, 0.8], [0.5, 0.4]], [1.0, 1.0, 1.0, 1.9, 2.8]) == [2, 0]


def test_a_probes_tokens_are_worth_more():
    step_s = [1.0, 1.0, 1.9]
    assert lengths([[0.6], [0.5]], step_s) == [1, 0]
    assert lengths([[0.6], [0.5]], step_s, weights=[1.0, 2.0]) == [0, 1]


def test_weights_buy_no_step_that_is_slower_a_token():
    # Worth 2 x 0.5 a second to the probe, but the step yields fewer tokens a second.
    assert lengths([[0.5]], [1.0, 1.6], weights=[2.0]) == [0]


def test_a_stair_of_the_step_time_is_climbed_when_it_pays_in_the_end():
    # The first token pays for nothing; all four together do.
    assert lengths([[0.9] * 4], [1.0, 1.95, 1.95, 1.95, 1.95]) == [4]


def test_shares_of_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="step_s must be one longer"):
        lengths([[0.9], [0.3]], [1.0] * 2)


def test_nothing_is_drafted_before_anything_was_measured():
    budget = AdaptiveBudget(StepTimeModel(), 8, 16)
    assert budget.choose(candidates([[0.99] * 8])).tolist() == [0]


def test_a_full_engine_drafts_nothing_and_an_empty_one_all():
    # Memory-bound up to 32 tokens, then proportional.
    model = model_of(lambda rows, drafted: max(32, rows + drafted) / 1000)
    budget = AdaptiveBudget(model, 8, 16)
    assert budget.choose(candidates([[0.9, 0.7]] * 64)).sum() == 0
    assert budget.choose(candidates([[0.9, 0.7]] * 2)).tolist() == [2, 2]


def test_a_measured_cost_of_verification_stops_drafting():
    model = model_of(lambda rows, drafted: 0.05 + (0.2 if drafted else 0.0))
    budget = AdaptiveBudget(model, 8, 16)
    assert budget.choose(candidates([[0.9, 0.7]] * 2)).sum() == 0


def test_drafts_are_longer_in_the_tail():
    budget = AdaptiveBudget(StepTimeModel(), 8, 16)
    assert budget.max_draft_tokens(1) == 16
    assert budget.max_draft_tokens(64) == 8


def looks(
    budget: AdaptiveBudget,
    rows: list[list[float]],
    *,
    num_steps: int,
    step_s: float = 0.005,
) -> int:
    """Steps out of so many in which it looks for drafts, which takes a millisecond.

    As many of the drafted tokens are accepted as their confidences say, in `step_s`.
    """
    num_looks = 0
    for _ in range(num_steps):
        if budget.max_draft_tokens(len(rows)):
            num_looks += 1
            chosen = budget.choose(candidates(rows))
            budget.pay(len(rows), 0.001)
            if chosen.any():
                accepted = sum(
                    sum(row[:n]) for row, n in zip(rows, chosen, strict=True)
                )
                budget.settle(len(rows), len(rows) + accepted, 0, step_s)
    return num_looks


def test_steps_look_for_drafts_as_often_as_that_pays():
    # A token costs what a row does: no draft pays.
    budget = AdaptiveBudget(
        model_of(lambda rows, drafted: (rows + drafted) / 1e3), 8, 8
    )
    looks(budget, [[0.5]] * 8, num_steps=800)
    assert looks(budget, [[0.5]] * 8, num_steps=1600) == 100
    # Drafts cost nothing, and save as much as half a look takes.
    budget = AdaptiveBudget(model_of(lambda rows, drafted: 0.005), 8, 8)
    looks(budget, [[0.2], []], num_steps=200)
    expected = pytest.approx(400 * (0.005 * 0.2 / 2) / 0.001, rel=0.3)
    assert looks(budget, [[0.2], []], num_steps=400) == expected


def test_drafts_that_save_less_than_they_promise_are_looked_for_less():
    budget = AdaptiveBudget(model_of(lambda rows, drafted: 0.005), 8, 8)
    rows = [[0.9, 0.8], [0.9]]
    looks(budget, rows, num_steps=200)
    assert looks(budget, rows, num_steps=160) == 160
    looks(budget, rows, num_steps=800, step_s=0.02)
    assert looks(budget, rows, num_steps=160, step_s=0.02) == 10


def test_where_drafts_pay_in_runs_a_run_that_was_met_is_followed():
    # One step in forty begins a run of eight; elsewhere nothing pays.
    budget = AdaptiveBudget(model_of(lambda rows, drafted: 0.005), 8, 8)
    looks_in = {True: 0, False: 0}
    for step in range(8000):
        in_run = step % 40 < 8
        looks_in[in_run] += looks(budget, [[0.9] if in_run else []], num_steps=1)
    assert looks_in[False] < 0.4 * 6400
    assert looks_in[True] > 0.8 * 1600


def test_batches_of_other_sizes_do_not_tell_whether_looking_pays():
    budget = AdaptiveBudget(model_of(lambda rows, drafted: 0.05), 8, 8)
    looks(budget, [[]] * 16, num_steps=1000)
    assert looks(budget, [[0.9]], num_steps=50) >= 50 - 15


def test_a_slow_step_of_the_machines_is_not_blamed_on_drafts():
    budget = AdaptiveBudget(model_of(lambda rows, drafted: 0.005), 8, 8)
    rows = [[0.9, 0.8], [0.9]]
    looks(budget, rows, num_steps=200)
    looks(budget, rows, num_steps=1, step_s=0.5)
    assert looks(budget, rows, num_steps=100) == 100


def test_when_drafts_pay_again_every_step_looks_for_them_soon():
    budget = AdaptiveBudget(model_of(lambda rows, drafted: 0.05), 8, 16)
    looks(budget, [[]] * 8, num_steps=1000)
    looks(budget, [[0.9] * 8] * 8, num_steps=32, step_s=0.05)
    assert looks(budget, [[0.9] * 8] * 8, num_steps=32, step_s=0.05) == 32


def test_fixed_drafts_all_there_is():
    budget = FixedBudget(4)
    assert budget.max_draft_tokens(100) == 4
    assert budget.choose(candidates([[0.1, 0.1], []])).tolist() == [2, 0]


def test_the_papers_rule_favours_the_class_whose_acceptance_drops_more():
    # As printed: a larger weight gives probes fewer tokens.
    model = model_of(lambda rows, drafted: max(32, rows + drafted) / 1000)
    rows = [[0.9] * 8] * 8
    weights = [2.0] + [1.0] * 7

    def tokens_of_probe(probe_weight: float) -> int:
        budget = PaperBudget(model, 8, probe_weight)
        return int(budget.choose(candidates(rows, weights))[0])

    assert tokens_of_probe(1.0) >= tokens_of_probe(4.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adaptive", AdaptiveBudget), ("fixed", FixedBudget), ("paper", PaperBudget)],
)
def test_settings_name_the_budget(name, kind):
    budget = make_budget(SpeculationConfig(budget=name), StepTimeModel())
    assert isinstance(budget, kind)


def on_graphs(graph_tokens: int | None, jump_s: float) -> AdaptiveBudget:
    """Steps of up to 400 tokens take 10 ms, and others so much longer."""
    model = StepTimeModel(graph_tokens)
    for _ in range(20):
        for rows, each in ((1, 8), (4, 8), (64, 0), (100, 2), (44, 8), (50, 8)):
            tokens = rows * (1 + each)
            step_s = 0.01 + jump_s * (tokens > 400)
            model.observe(rows, rows * each, 100 * rows, step_s)
    return AdaptiveBudget(model, 8, 8)


def test_drafts_stop_where_steps_leave_the_graphs_unless_more_of_them_pay():
    # 100 rows have room for 300 drafted tokens, and 500 have some promise.
    rows = [[0.8, 0.7, 0.6, 0.5, 0.3]] * 100
    assert on_graphs(400, 0.006).choose(candidates(rows)).sum() == 300
    assert on_graphs(400, 0.0005).choose(candidates(rows)).sum() == 500
    promising = [[0.95, 0.94, 0.93, 0.92, 0.91]] * 100
    assert on_graphs(400, 0.002).choose(candidates(promising)).sum() == 500
    assert on_graphs(400, 0.006).choose(candidates(promising)).sum() == 300


def test_a_budget_that_does_not_know_of_the_graphs_misses_their_end():
    rows = [[0.8, 0.7, 0.6, 0.5, 0.3]] * 100
    assert on_graphs(None, 0.006).choose(candidates(rows)).sum() != 300


def test_where_requests_alone_leave_the_graphs_their_end_is_nothing_to_drafts():
    budget = on_graphs(400, 0.006)
    assert budget.choose(candidates([[0.9, 0.8]] * 450)).sum() == 900
