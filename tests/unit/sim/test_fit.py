"""Prices of a step are found again in the timeline that they made."""

from __future__ import annotations

import json
import random

import pytest

from aseer.errors import ConfigError
from aseer.report import TimelineSample
from aseer.sim import Cluster, simulate
from aseer.sim import workload as workloads
from aseer.sim.fit import LinearSteps, fit_steps, read_report

TRUE = LinearSteps(base_s=0.02, token_s=1e-4, kv_token_s=2e-7)
CAPACITY = 100_000


def timeline(*, true=TRUE, noise=0.0, drafted=0, accepted=0, num_samples=200, pause=()):
    """What an instance's samples would be: a few steps between each two of them."""
    rng = random.Random(1)
    now, made, drafts = 0.0, 0, 0
    samples = []
    for i in range(num_samples):
        num_running, kv = 8 + i % 3, rng.uniform(0.1, 0.9)
        for _ in range(2):  # nothing but time and tokens changes in a stretch
            samples.append(
                TimelineSample(
                    t_s=now,
                    instance_id=0,
                    num_running=num_running + 2,
                    num_waiting=2,
                    kv_used=kv,
                    kv_reserved=kv,
                    num_output_tokens=made,
                    num_drafts=drafts,
                    num_drafted_tokens=drafts * drafted,
                    num_accepted_tokens=drafts * accepted,
                )
            )
            num_steps = rng.randint(35, 60)
            step_s = true.seconds(num_running * (1 + drafted), kv * CAPACITY)
            now += num_steps * step_s * rng.uniform(1 - noise, 1 + noise)
            made += num_steps * num_running * (1 + accepted)
            drafts += num_steps * num_running
            if i in pause:
                now += 30.0
        samples.append(samples[-1].__class__(**(as_dict(samples[-1]) | {"t_s": now})))
    return samples


def as_dict(sample):
    return {name: getattr(sample, name) for name in TimelineSample.__slots__}


def assert_near(found, rel):
    for num_tokens, kv in ((1, 0), (8, 20_000), (12, 90_000)):
        assert found.seconds(num_tokens, kv) == pytest.approx(
            TRUE.seconds(num_tokens, kv), rel=rel
        )


def fitted(**how):
    pairs = timeline(**how)
    # An id for each pair, so that no stretch spans two loads.
    samples = [
        TimelineSample(**(as_dict(s) | {"instance_id": i // 3}))
        for i, s in enumerate(pairs)
        if i % 3 != 2
    ]
    return fit_steps(samples, dict.fromkeys(range(len(pairs)), CAPACITY))


def test_prices_are_found_again():
    assert_near(fitted(), rel=1e-6)


def test_noise_is_averaged():
    assert_near(fitted(noise=0.1), rel=0.05)


def test_drafted_tokens_are_work_and_accepted_ones_are_not_steps():
    assert_near(fitted(drafted=4, accepted=2), rel=0.2)


def test_pauses_are_left_out():
    assert_near(fitted(noise=0.02, pause=(20, 90, 150)), rel=0.05)


def test_no_price_is_below_0():
    found = fitted(
        true=LinearSteps(base_s=0.0, token_s=1e-3, kv_token_s=0.0), noise=0.2
    )
    assert min(found.base_s, found.token_s, found.kv_token_s) >= 0
    assert found.seconds(9, 50_000) == pytest.approx(9e-3, rel=0.1)


def test_too_short_a_timeline_is_explained():
    with pytest.raises(ConfigError, match="has 0 stretches with work"):
        fit_steps([], {})


def saved(tmp_path, **changes):
    """A report with steps of known prices, of a simulated rollout."""
    work = workloads.lognormal(
        name="w",
        num_groups=12,
        group_size=4,
        mean=300,
        max_tokens=1500,
        num_prompt_tokens=16,
    )
    cluster = Cluster(
        num_instances=2, step_time=TRUE, num_kv_tokens=CAPACITY, max_num_seqs=16
    )
    report = simulate(work, cluster, chunk_size=16).to_dict() | changes
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    return path, work


def test_a_report_becomes_a_cluster_that_takes_as_long(tmp_path):
    path, work = saved(tmp_path)
    measured = read_report(path, max_num_seqs=16)
    assert measured.workload.num_tokens == work.num_tokens
    assert measured.cluster.num_instances == 2
    again = simulate(measured.workload, measured.cluster, chunk_size=16)
    assert again.wall_s == pytest.approx(measured.report["wall_s"], rel=0.1)
    assert not measured.speculated


@pytest.mark.parametrize("content", ["[]", "{}", "no", '{"timeline": [{"t": 1}]}'])
def test_what_is_no_report_is_explained(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is not a rollout's report"):
        read_report(path)


def test_a_report_of_nothing_is_explained(tmp_path):
    path, _ = saved(tmp_path, timeline=[])
    with pytest.raises(ConfigError, match="longer rollout"):
        read_report(path)
