"""What is thought of figures: what fails, what warns, and what is only recorded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aseer.cli.findings import Finding, fail, ok, warn
from aseer.cli.hour.drafts import Drafted, Speed, judge_drafted, judge_speeds
from aseer.cli.hour.exact import (
    Agreement,
    Exactness,
    judge_bfloat16,
    judge_exactness,
)
from aseer.cli.hour.load import Load, judge_loads
from aseer.cli.hour.machine import (
    MachineFacts,
    gpu_lines,
    judge_machine,
    telling_variables,
)
from aseer.cli.hour.pool import Pooled, judge_pooled, pooled_of
from aseer.cli.hour.rolling import Compared
from aseer.cli.hour.sleeping import Slept, judge_slept, used_mib
from aseer.cli.hour.training import (
    ProgramError,
    Replayed,
    Trained,
    judge_replayed,
    judge_trained,
    trained_of,
)
from aseer.cli.hour.weights import SizedUpdate, Updated, judge_sized, judge_updates

if TYPE_CHECKING:
    from collections.abc import Mapping


def compared(what: str = "chunks", difference: str = "", **figures: Any) -> Compared:
    fixed: dict[str, Any] = {
        "num_responses": 6,
        "num_chunks": 30,
        "num_migrations": 24,
        "num_preemptions": 0,
        "num_retries": 3,
        "num_recomputed_tokens": 0,
        "tokens_per_s": 100.0,
    }
    return Compared(what=what, difference=difference, **fixed | figures)


# 0: the machine

FACTS = MachineFacts(
    checks={"python": ok("3.12"), "gpus": ok("8 visible (0, 1)")},
    gpus=["GPU 0: NVIDIA H100"],
    shm=(64.0, 60.5),
    num_cores=96,
    free_memory_gib=900.0,
    modules={"cupy": "13.0"},
    variables={},
)


def test_a_machine_is_told_in_a_line() -> None:
    finding = judge_machine(FACTS)
    assert finding.status == "ok"
    assert "GPUs: 8 visible (0, 1); 96 cores" in finding.detail
    assert "60.5 of 64.0 GiB free in /dev/shm" in finding.detail
    assert finding.detail.endswith("cupy: 13.0")


@pytest.mark.parametrize(
    ("check", "status", "text"),
    [
        (warn("64 MiB", "--shm-size"), "warn", "shared memory: 64 MiB"),
        (fail("none", "mount it"), "fail", "mount it"),
        (Finding(status="skip", detail="needs torch"), "ok", ""),
    ],
)
def test_a_check_that_warns_is_told_and_one_that_fails_ends_the_list(
    check: Finding, status: str, text: str
) -> None:
    finding = judge_machine(replace(FACTS, checks={"shared memory": check}))
    assert finding.status == status
    assert text in finding.advice


def test_a_machine_without_shared_memory_is_told() -> None:
    assert "no /dev/shm" in judge_machine(replace(FACTS, shm=None)).detail


def test_cards_are_listed_without_what_tells_one_from_another() -> None:
    listed = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5a-1)\n\n  MIG 1g Device 0: (UUID: M)"
    )
    assert gpu_lines(listed) == ["GPU 0: NVIDIA H100 80GB HBM3", "MIG 1g Device 0:"]
    assert gpu_lines("") == []


def test_variables_are_told_that_change_engines_and_are_no_secrets() -> None:
    environ = {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "VLLM_API_KEY": "x",
        "NCCL_SECRET": "x",
        "ASEER_KEY": "x",
        "HOME": "/root",
        "MY_VLLM_HOME": "x",
    }
    assert list(telling_variables(environ)) == [
        "CUDA_VISIBLE_DEVICES",
        "VLLM_USE_V2_MODEL_RUNNER",
    ]


# 1 and 2: exactness


def exactness(*compared: Compared) -> Exactness:
    return Exactness(scheduling="", device="cuda", start_s=9.6, compared=[*compared])


EQUAL = exactness(
    compared("chunks", num_migrations=0, num_retries=0),
    compared("chunks that move", num_retries=0),
    compared("an engine killed"),
)
DIFFERENT = exactness(compared(difference="the tokens of g7/0"))


def test_equal_everywhere_is_ok() -> None:
    finding = judge_exactness([EQUAL, EQUAL])
    assert finding.status == "ok"
    assert "chunks, chunks that move, an engine killed" in finding.detail
    assert "up in 10 s" in finding.detail


def test_of_one_engine_nothing_more_is_asked_if_all_is_equal() -> None:
    finding = judge_exactness([EQUAL])
    assert finding.status == "ok"
    assert "async" not in finding.detail


@pytest.mark.parametrize(
    ("default", "in_step", "text", "advice"),
    [
        (
            DIFFERENT,
            EQUAL,
            "with async scheduling off all are equal",
            "async_scheduling",
        ),
        (DIFFERENT, DIFFERENT, "off, too, so that it is not the cause", "report this"),
        (EQUAL, DIFFERENT, "with async scheduling off: chunks: the tok", "report this"),
    ],
)
def test_a_difference_has_a_cause(
    default: Exactness, in_step: Exactness, text: str, advice: str
) -> None:
    finding = judge_exactness([default, in_step])
    assert finding.status == "fail"
    assert text in finding.detail
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("each", "text"),
    [
        (compared("chunks", num_chunks=6), "nothing was divided"),
        (compared("chunks that move", num_migrations=0), "no request moved"),
        (compared("an engine killed", num_retries=0), "had no request"),
    ],
)
def test_what_was_not_tried_is_not_called_right(each: Compared, text: str) -> None:
    finding = judge_exactness([exactness(each), EQUAL])
    assert finding.status == "fail"
    assert text in finding.detail


def test_bfloat16_never_fails() -> None:
    some = Agreement(what="by default", num_responses=6, num_in_chunks=2, num_alone=5)
    finding = judge_bfloat16([some, Agreement(what="invariant", error="no kernel")])
    assert finding.status == "ok"
    assert "of 6 responses 2 are the same in chunks, 5 in another" in finding.detail
    assert "invariant: did not run (no kernel)" in finding.detail


# 3: load

LOAD = Load(
    what="default limits",
    num_engines=8,
    rows=1024,
    kv_tokens=400_000,
    start_s=60.0,
    num_responses=2048,
    num_wanted=2_097_152,
    num_short=0,
    wall_s=100.0,
    tail_s=3.0,
    tokens_per_s=20_971.5,
    num_preemptions=0,
    num_migrations=7,
    num_recomputed_tokens=0,
    num_retries=0,
    idle_fraction=0.1,
    controller_cpu=0.254,
    killed=False,
)
DEATH = replace(LOAD, what="an engine killed", killed=True, num_retries=200)


def test_load_tells_its_speed_and_the_controllers_share() -> None:
    finding = judge_loads([LOAD, DEATH])
    assert finding.status == "ok"
    assert "20,972 tokens/s on 8 engines, 0 preemptions" in finding.detail
    assert "controller 25% of a core" in finding.detail
    assert "all 2048 responses came, 200 chunks were lost" in finding.detail


@pytest.mark.parametrize(
    ("loads", "status", "text"),
    [
        ([replace(LOAD, num_short=3)], "fail", "3 of 2048 responses are shorter"),
        ([LOAD, replace(DEATH, num_short=1)], "fail", "an engine killed: 1 of 2048"),
        ([LOAD, replace(DEATH, num_retries=0)], "fail", "nothing was shown"),
        ([replace(LOAD, num_preemptions=2), LOAD], "warn", "2 preemptions, where none"),
        ([LOAD, replace(DEATH, num_preemptions=2)], "ok", "default limits"),
    ],
)
def test_lost_tokens_fail_and_preemptions_warn(loads, status, text) -> None:
    finding = judge_loads(loads)
    assert finding.status == status
    assert text in finding.detail


# 4: weights

UPDATED = Updated(
    ranks=1,
    transfer="host",
    source="cuda:0",
    num_responses=6,
    num_unchanged=0,
    back="",
    ranks_differ="",
    send_s=0.1,
    prepare_s=0.1,
    switch_s=0.26,
)
TWO = replace(UPDATED, ranks=2)


def test_updates_are_told_with_what_there_are_too_few_gpus_for() -> None:
    finding = judge_updates([UPDATED, TWO], wanted=(1, 2, 8))
    assert finding.status == "ok"
    assert "from cuda:0" in finding.detail
    assert "1 (host, 0.3 s), 2 (host, 0.3 s); too few GPUs for 8" in finding.detail
    assert "too few" not in judge_updates([UPDATED, TWO], wanted=(1, 2)).detail


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (replace(TWO, num_unchanged=6), "new weights change nothing"),
        (replace(TWO, back="the tokens of r"), "back at the first weights, the tokens"),
        (replace(TWO, ranks_differ="the tokens of r"), "unlike one worker, the tokens"),
    ],
)
def test_an_update_that_is_wrong_fails(wrong: Updated, text: str) -> None:
    finding = judge_updates([UPDATED, wrong])
    assert finding.status == "fail"
    assert finding.detail.startswith("2 workers, weights by 'host': ")
    assert text in finding.detail


def test_some_responses_may_stay_as_they_were() -> None:
    assert judge_updates([replace(UPDATED, num_unchanged=5)]).status == "ok"


def test_the_time_of_a_large_update_is_recorded() -> None:
    sized = SizedUpdate(
        num_engines=8,
        source="cuda:0",
        gb=16.4,
        load_s=5.0,
        send_s=6.0,
        prepare_s=1.0,
        switch_s=2.5,
    )
    finding = judge_sized(sized)
    assert finding.status == "ok"
    assert "16.4 GB from cuda:0 to 8 engines in 9.5 s" in finding.detail


# 5: sleep

SLEPT = Slept(
    after_level_1="",
    after_tags="",
    after_level_2="",
    used_mib=9000,
    asleep_mib=2000,
    weights_mib=2100,
)


@pytest.mark.parametrize(
    ("slept", "status", "text"),
    [
        (SLEPT, "ok", "7000 MiB were free meanwhile"),
        (replace(SLEPT, after_level_1="x"), "fail", "level 1: x"),
        (replace(SLEPT, after_tags="x"), "fail", "waking by tags: x"),
        (replace(SLEPT, after_level_2="x"), "fail", "level 2: x"),
        (replace(SLEPT, asleep_mib=8900), "warn", "100 MiB were free"),
        (replace(SLEPT, used_mib=None), "ok", "nvidia-smi tells no memory"),
    ],
)
def test_engines_that_slept_are_as_before_and_let_memory_go(
    slept, status, text
) -> None:
    finding = judge_slept(slept)
    assert finding.status == status
    assert text in finding.detail


def test_memory_is_added_up_over_gpus() -> None:
    assert used_mib("1024\n80\n") == 1104
    assert used_mib("") is None
    assert used_mib("[N/A]\n") is None


# 6: the pool


def kv(found: int, recomputed: int) -> Any:
    return SimpleNamespace(
        num_moves_found=found,
        num_moves_recomputed=recomputed,
        num_loads=found,
        load_p50_s=0.004,
    )


def pool_figures(what: str, **figures: Any) -> Pooled:
    fixed: dict[str, Any] = {
        "compared": compared(what, **figures.pop("compared", {})),
        "num_found": 18,
        "num_recomputed": 0,
        "tokens_a_move": 1.0,
        "num_loads": 18,
        "load_p50_s": 0.004,
        "num_restarts": 0 if what == "moves" else 1,
        "lost_engines": 0,
        "wall_s": 2.0,
    }
    return Pooled(**fixed | figures)


KILLED = pool_figures("server killed", num_recomputed=9, num_found=9)
STOPPED = pool_figures("server stopped", num_recomputed=9, num_found=9)


@pytest.mark.parametrize(
    ("found", "recomputed", "num_tokens", "a_move"),
    [(18, 0, 0, 1.0), (0, 18, 18 * 128, 129.0), (9, 9, 9 * 128, 65.0), (0, 0, 0, None)],
)
def test_a_move_computes_what_was_computed_again_and_one(
    found: int, recomputed: int, num_tokens: int, a_move: float | None
) -> None:
    pooled = pooled_of(
        compared(num_recomputed_tokens=num_tokens),
        kv(found, recomputed),
        num_restarts=0,
        lost_engines=0,
        wall_s=1.0,
    )
    assert pooled.tokens_a_move == a_move


def test_a_pool_whose_moves_compute_one_token_is_ok() -> None:
    finding = judge_pooled([pool_figures("moves"), KILLED, STOPPED])
    assert finding.status == "ok"
    assert "a move computes 1 tokens (18 moves found" in finding.detail


@pytest.mark.parametrize(
    ("found", "status", "text"),
    [
        (
            [pool_figures("moves", num_recomputed=18, tokens_a_move=129.0)],
            "warn",
            "a move computes 129 tokens",
        ),
        ([pool_figures("moves", tokens_a_move=None)], "fail", "no request moved"),
        (
            [pool_figures("moves", compared={"difference": "the tokens of r"})],
            "fail",
            "moves: the tokens of r",
        ),
        (
            [pool_figures("moves"), replace(KILLED, lost_engines=1)],
            "fail",
            "server killed: 1 engines died",
        ),
        (
            [pool_figures("moves"), KILLED, replace(STOPPED, num_restarts=0)],
            "fail",
            "server stopped: it did not come back",
        ),
    ],
)
def test_a_pool_that_does_harm_fails_and_one_that_computes_more_warns(
    found, status, text
) -> None:
    finding = judge_pooled(found)
    assert finding.status == status
    assert text in finding.detail


# 7 and 8: drafts

DRAFTED = Drafted(
    compared=compared("dgds on V2"),
    num_drafts=40,
    num_accepted=90,
    acceptance_length=3.25,
)


@pytest.mark.parametrize(
    ("drafted", "status", "text"),
    [
        (DRAFTED, "ok", "dgds on V2: equal, 40 drafts, 3.25 tokens a draft"),
        (replace(DRAFTED, num_drafts=0), "warn", "0 drafts"),
        (
            replace(DRAFTED, compared=compared("dgds on V1", "the tokens of r")),
            "fail",
            "dgds on V1: the tokens of r",
        ),
    ],
)
def test_drafts_that_change_tokens_fail_and_none_at_all_warn(
    drafted: Drafted, status: str, text: str
) -> None:
    finding = judge_drafted([DRAFTED, drafted])
    assert finding.status == status
    assert text in finding.detail


def test_speeds_are_recorded_by_arm_and_batch() -> None:
    speeds = [
        Speed(
            arm=arm,
            batch=batch,
            tokens_per_s=rate * batch,
            tokens_a_step=1.0,
            acceptance_length=1.0,
            drafting_share=0.0,
        )
        for arm, rate in (("v2-off", 100.0), ("v2-dgds", 90.4))
        for batch in (1, 16)
    ]
    finding = judge_speeds(speeds)
    assert finding.status == "ok", "a gain that is a loss fails nothing"
    assert "with 1/16 requests at once: v2-off 100 / 1,600; v2-dgds 90 / 1,446" in (
        finding.detail
    )


# 9: training

TRAINED = Trained(
    command="python x", num_responses=12, logprob_off_max=2e-6, ratio_mean=1.0
)


@pytest.mark.parametrize(
    ("trained", "status"),
    [
        (TRAINED, "ok"),
        (replace(TRAINED, logprob_off_max=0.01), "fail"),
        (replace(TRAINED, logprob_off_max=float("nan")), "fail"),
        (replace(TRAINED, ratio_mean=1.01), "fail"),
    ],
)
def test_a_trainer_that_computes_other_logprobs_fails(trained, status) -> None:
    assert judge_trained(trained).status == status


ROW = {"num_responses": "12", "logprob_off_max": "2e-06", "ratio_mean": "1.0"}


def test_the_last_step_of_training_counts() -> None:
    rows = [{"ratio_mean": ""}, {**ROW, "num_responses": "9"}, ROW]
    assert trained_of("python x", rows) == TRAINED


@pytest.mark.parametrize("rows", [[], [{"iteration": "0", "ratio_mean": ""}]])
def test_training_without_a_step_is_an_error(rows: list[Mapping[str, str]]) -> None:
    with pytest.raises(ProgramError, match="python x: it made no step"):
        trained_of("python x", rows)


def test_a_replays_gains_are_recorded() -> None:
    replayed = Replayed(
        command="python bench.py",
        tokens_per_s={"verl-today": 100.0, "full": 81.0},
        over_base={"verl-today": 1.0, "full": 0.81},
    )
    finding = judge_replayed(replayed)
    assert finding.status == "ok", "a gain that is a loss fails nothing"
    assert "verl-today 1.00, full 0.81 (`python bench.py`)" in finding.detail
