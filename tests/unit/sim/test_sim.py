"""A simulated cluster does all the work, in the time its step model says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from aseer.config import POLICY_NAMES
from aseer.errors import ConfigError
from aseer.policies import POLICIES
from aseer.sim import GPUS, MODELS, Cluster, Roofline, Workload, simulate
from aseer.sim import workload as workloads
from aseer.sim.drafting import Drafting, acceptance, expected_yield
from aseer.sim.engine import SimEngine
from aseer.sim.fit import LinearSteps


@dataclass(frozen=True)
class Steps:
    """A step takes 10 ms, 10 us a token and 1 us a token of KV."""

    prefill: float = 0.0

    def seconds(self, num_tokens, num_kv_tokens):
        return 1e-2 + 1e-5 * num_tokens + 1e-6 * num_kv_tokens

    def prefill_s(self, num_tokens):
        return self.prefill * num_tokens


def cluster(num_instances=2, num_kv_tokens=100_000, **changes):
    settings = {"step_time": Steps(), "block_size": 16, **changes}
    return Cluster(num_instances=num_instances, num_kv_tokens=num_kv_tokens, **settings)


def workload(*lengths, num_prompt_tokens=16, max_tokens=10_000):
    return Workload(
        name="test",
        lengths=lengths,
        num_prompt_tokens=[num_prompt_tokens] * len(lengths),
        max_tokens=max_tokens,
    )


def decode_s(batch, start_kv, num_steps):
    """The same, step by step."""
    kv = start_kv + batch * np.arange(num_steps)
    return sum(Steps().seconds(batch, n) for n in kv)


def test_one_request_takes_as_long_as_its_steps():
    report = simulate(workload([700]), cluster(1), chunk_size=0)
    assert report.wall_s == pytest.approx(decode_s(1, 16, 700), rel=1e-3)
    assert report.num_output_tokens == 700


def test_a_batch_shrinks_as_its_requests_end():
    report = simulate(workload([200, 500]), cluster(1), policy="least-loaded")
    both = decode_s(2, 32, 200)
    assert report.completions[0].t_s == pytest.approx(both, rel=1e-3)
    rest = decode_s(1, 216, 300)
    assert report.wall_s == pytest.approx(both + rest, rel=1e-3)


def test_chunks_cost_nothing_where_their_kv_stays():
    whole = simulate(workload([700]), cluster(1), chunk_size=0)
    chunks = simulate(workload([700]), cluster(1), chunk_size=64)
    assert chunks.num_chunks > 8
    assert chunks.num_recomputed_tokens == 0
    assert chunks.wall_s == pytest.approx(whole.wall_s, rel=1e-3)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("drafting", ["off", "own", "grouped"])
def test_every_request_is_finished_by_every_policy(policy, drafting):
    lengths = [[100, 300, 700, 150], [1500, 1200, 2000, 900]] * 8
    report = simulate(
        workload(*lengths, max_tokens=2000),
        cluster(num_kv_tokens=6_000),
        policy=policy,
        chunk_size=256,
        drafting=drafting,
    )
    assert report.num_responses == 64
    assert report.num_output_tokens == sum(map(sum, lengths))
    assert report.finish_reasons == {"stop": 56, "length": 8}
    assert sorted(c.num_output_tokens for c in report.completions) == sorted(
        n for members in lengths for n in members
    )


def test_kv_is_preempted_only_where_it_is_not_reserved():
    work = workload(*[[2000, 1500, 1800, 1000]] * 4)
    small = cluster(1, num_kv_tokens=8_000)
    assert simulate(work, small, policy="least-loaded").num_preemptions > 0
    assert simulate(work, small, policy="context-aware").num_preemptions == 0


def test_a_preempted_request_computes_its_tokens_again():
    work = workload([900, 900, 900], num_prompt_tokens=100)
    free, dear = (
        simulate(
            work,
            cluster(1, num_kv_tokens=2_500, step_time=Steps(prefill)),
            policy="least-loaded",
        )
        for prefill in (0.0, 1e-3)
    )
    assert free.num_preemptions == dear.num_preemptions > 0
    # The prompts, and what the preempted had.
    assert dear.wall_s - free.wall_s > 3 * 99e-3 + 0.5


def test_moving_costs_a_recomputation_unless_there_is_a_pool():
    lengths = [[3000, 60, 60, 60]] * 6
    settings = {"step_time": Steps(1e-4), "num_kv_tokens": 4_000, "max_num_seqs": 4}
    without = simulate(workload(*lengths), cluster(**settings), chunk_size=64)
    pool = {"kv_bytes_per_token": 1e3, "load_bytes_per_s": 1e9}
    with_pool = simulate(workload(*lengths), cluster(**settings, **pool), chunk_size=64)
    assert without.num_recomputed_tokens > 0
    assert with_pool.num_recomputed_tokens == 0
    assert with_pool.wall_s < without.wall_s


def test_knowing_the_lengths_shortens_the_tail():
    work = workloads.lognormal(
        name="t", num_groups=30, group_size=8, mean=300, max_tokens=2000, seed=1
    )
    reports = {
        policy: simulate(
            work, cluster(num_kv_tokens=15_000), policy=policy, chunk_size=128
        )
        for policy in ("fcfs", "context-aware", "longest-first")
    }
    tails = {policy: report.tail_s for policy, report in reports.items()}
    assert tails["longest-first"] < tails["context-aware"] < tails["fcfs"]


def test_siblings_help_drafting():
    work = workload(*[list(range(100, 500, 50))] * 8)
    walls = [
        simulate(work, cluster(), drafting=d).wall_s for d in ("off", "own", "grouped")
    ]
    assert walls[0] > walls[1] > walls[2]


def test_the_same_call_gives_the_same_report():
    work = workloads.paper("moonlight", scale=0.02)
    shape = Roofline(model=MODELS["moonlight"], gpu=GPUS["H800"])
    like = cluster(1, num_kv_tokens=shape.kv_tokens(), step_time=shape)
    assert simulate(work, like) == simulate(work, like)


def test_a_response_that_fits_nowhere_is_refused():
    with pytest.raises(ConfigError, match=r"group 1 .* 5016 tokens .* holds 4000"):
        simulate(workload([10], [5000]), cluster(num_kv_tokens=4_000))


# Workloads


@pytest.mark.parametrize("name", sorted(workloads.PAPER))
def test_the_papers_workloads_have_their_mean_and_maximum(name):
    settings = workloads.PAPER[name]
    work = workloads.paper(name)
    assert work.num_requests == settings["num_groups"] * settings["group_size"]
    mean = work.num_tokens / work.num_requests
    assert mean == pytest.approx(settings["mean"], rel=1e-3)
    longest = max(n for members in work.lengths for n in members)
    assert longest == settings["max_tokens"]
    logs = np.log(np.asarray(work.lengths, float))
    between = logs.mean(axis=1).var() / logs.var()
    assert 0.75 < between < 0.95  # siblings are alike


def test_a_workload_is_read_as_it_was_written(tmp_path):
    work = workload([3, 5], [7], max_tokens=7)
    workloads.save(work, tmp_path / "test.json")
    read = workloads.load(tmp_path / "test.json")
    assert read.lengths == [[3, 5], [7]]
    assert (read.name, read.num_prompt_tokens, read.max_tokens) == ("test", [16, 16], 7)


def test_recorded_rollouts_are_workloads(tmp_path):
    path = tmp_path / "traces.json"
    path.write_text('[{"prompt": [1, 2], "responses": [[3], [4, 5, 6]]}]')
    work = workloads.load(path, max_tokens=9)
    assert (work.lengths, work.num_prompt_tokens) == ([[1, 3]], [2])
    assert work.max_tokens == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not a workload"), ("[{}]", "KeyError"), ('[{"lengths": []}]', "Key")],
)
def test_a_bad_file_is_explained(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        workloads.load(path)


def test_lengths_are_checked():
    with pytest.raises(ConfigError, match=r"group 0 has lengths \[0\]"):
        workload([0])
    with pytest.raises(ConfigError, match="max_tokens=10"):
        workload([11], max_tokens=10)


# Models


def test_a_roofline_is_the_longer_of_bytes_and_flops():
    shape = Roofline(
        model=MODELS["qwen3-8b"],
        gpu=GPUS["H100"],
        memory_efficiency=1.0,
        compute_efficiency=1.0,
        overhead_s=0.0,
    )
    alone = (16.4e9 + 1000 * 147_456) / 3.35e12
    assert shape.seconds(1, 1000) == pytest.approx(alone)
    many = (2 * 8.2e9 * 100_000 + 36 * 32 * 4 * 128) / 989e12
    assert shape.seconds(100_000, 1) == pytest.approx(many)


def test_a_mixture_of_experts_reads_what_its_tokens_touch():
    shape = Roofline(model=MODELS["kimi-k2"], gpu=GPUS["H800"], num_gpus=32)
    alone, many = shape.seconds(1, 0), shape.seconds(512, 0)
    assert alone < shape.overhead_s + 0.1 * (many - shape.overhead_s)


def test_drafting_yields_what_the_paper_measured():
    for siblings, wanted in ((0, 1.70), (15, 2.53)):
        accepted = acceptance(wanted, 8)
        yielded = expected_yield(np.array([accepted]), np.array([8.0]))
        assert yielded[0] == pytest.approx(wanted, rel=1e-6), siblings


def test_nothing_is_drafted_where_it_does_not_pay():
    class Dear(Steps):
        def seconds(self, num_tokens, num_kv_tokens):
            return 1e-2 * num_tokens

    rates, num_drafted = Drafting(8).rates(Dear(), [4, 4, 0, 0], 1000)
    assert rates == [1.0] * 4
    assert num_drafted == 0
    rates, num_drafted = Drafting(8).rates(Steps(), [4, 4, 0, 0], 1000)
    assert 1.6 < rates[0] < rates[1] < 2.5
    assert num_drafted > 0
    assert math.isfinite(num_drafted)


def test_a_request_that_changes_its_class_is_counted_in_one():
    # Drafts do not pay, so all classes advance alike, and so do their counters.
    steps = LinearSteps(base_s=0.0, token_s=0.01, kv_token_s=0.0)
    engine = SimEngine(
        step_time=steps, num_kv_tokens=1000, max_num_seqs=4, drafting=Drafting(4)
    )

    def run(request_id, chunk_id, class_):
        chunk = SimpleNamespace(
            chunk_id=chunk_id,
            request_id=request_id,
            group_id="g",
            prompt=bytes(4),
            generated=b"",
        )
        engine.add(chunk, 8)
        engine.set_class(chunk_id, class_)
        while (at := engine.next_event()) < math.inf:
            engine.advance(at)
            engine.take_ended()

    run("a", chunk_id=0, class_=1)
    run("b", chunk_id=1, class_=1)
    assert engine.num_generated == pytest.approx(16)
    assert engine.now == pytest.approx(16 * 0.01)


def test_siblings_share_their_prompt_where_engines_do():
    # Alone, three requests of 4 + 1 blocks do not fit into 12 blocks at once.
    work = workload([16, 16, 16], num_prompt_tokens=65)
    small = cluster(1, num_kv_tokens=12 * 16, step_time=Steps(prefill=1e-3))
    alone = simulate(work, small, policy="least-loaded")
    shared = simulate(work, replace(small, shares_prompts=True), policy="least-loaded")
    ends = [c.t_s for c in shared.completions]
    assert ends == pytest.approx([ends[0]] * 3)
    assert alone.wall_s > 1.8 * (shared.wall_s - 0.064)
    # The first of them computes 64 tokens of the prompt, the others find them.
    assert shared.wall_s == pytest.approx(0.064 + decode_s(3, 67, 16), rel=1e-2)


def test_reservations_hold_where_prompts_are_shared():
    work = workload(*[[300, 90, 700, 150]] * 6, num_prompt_tokens=200)
    small = cluster(2, num_kv_tokens=100 * 16, shares_prompts=True)
    for load_bytes_per_s in (None, 1e9):
        pooled = replace(
            small, load_bytes_per_s=load_bytes_per_s, kv_bytes_per_token=1e4
        )
        report = simulate(work, pooled, chunk_size=64)
        assert report.num_preemptions == 0
        assert report.num_output_tokens == 6 * 1240


def test_priors_start_the_longest_group_first():
    work = workload([50, 100], [300, 500])
    report = simulate(work, cluster(1, max_num_seqs=1), length_priors=[90, 400])
    assert [c.group_id for c in report.completions] == ["g1", "g1", "g0", "g0"]


def test_another_epoch_has_the_same_prompts_and_other_lengths():
    first, again, second = (
        workloads.paper("qwen2-vl-72b", scale=0.2, epoch=epoch) for epoch in (0, 0, 1)
    )
    assert first.lengths == again.lengths != second.lengths
    means = np.log([np.mean(w.lengths, axis=1) for w in (first, second)])
    assert np.corrcoef(means)[0, 1] > 0.9


def test_a_policy_of_ones_own_is_told_what_one_likes():
    def rank_shortest_first(request, length_estimate):
        return (request.known_length, request.arrival)

    work = workload([500, 100], [300, 50])
    told = []
    policy = replace(POLICIES["fcfs"], rank=rank_shortest_first)
    for known in (work.lengths, [[1, 2], [3, 4]]):
        report = simulate(
            work, cluster(1, max_num_seqs=1), policy=policy, known_lengths=known
        )
        told.append([c.num_output_tokens for c in report.completions])
    assert told == [[50, 100, 300, 500], [500, 100, 300, 50]]
