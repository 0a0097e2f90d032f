"""The report's figures as the paper defines them."""

from __future__ import annotations

import json

from aseer.report import InstanceReport, RolloutReport, tail_time


def test_nothing_finished_has_no_tail() -> None:
    assert tail_time([]) == 0.0


def test_one_request_has_no_tail() -> None:
    assert tail_time([7.0]) == 0.0


def test_the_tail_begins_when_nine_of_ten_are_done() -> None:
    assert tail_time([1, 2, 3, 4, 5, 6, 7, 8, 9, 50]) == 50 - 9


def test_order_of_completion_does_not_matter() -> None:
    assert tail_time([50, 9, 1, 2, 3, 4, 5, 6, 7, 8]) == 50 - 9


def test_a_fraction_of_a_request_belongs_to_the_body() -> None:
    # 90% of 11 is 9.9: the 10th is the last of the body.
    assert tail_time([*range(1, 11), 100]) == 100 - 10


def test_exactly_nine_tenths_are_the_body_however_many_they_are() -> None:
    for num_tens in range(1, 400):
        assert tail_time(range(10 * num_tens)) == num_tens


def test_a_report_is_plain_data() -> None:
    report = RolloutReport(
        policy="fcfs",
        chunk_size=8,
        num_groups=1,
        num_responses=2,
        num_prompt_tokens=8,
        num_output_tokens=10,
        wall_s=2.0,
        throughput_tok_s=5.0,
        tail_s=0.5,
        num_chunks=3,
        num_migrations=1,
        num_preemptions=0,
        num_recomputed_tokens=4,
        num_cached_tokens=4,
        num_retries=0,
        finish_reasons={"stop": 2},
        mean_output_tokens=5.0,
        max_output_tokens=6,
        idle_fraction=0.1,
        weight_version=3,
        instances=[
            InstanceReport(
                instance_id=0,
                num_output_tokens=10,
                num_chunks=3,
                num_preemptions=0,
                num_restarts=0,
                busy_s=1.5,
                num_kv_blocks=100,
                block_size=16,
                kv_tokens=1600,
            )
        ],
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert data["finish_reasons"] == {"stop": 2}
    assert data["instances"][0]["busy_s"] == 1.5
