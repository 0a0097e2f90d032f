"""What a user of the rollout API may rely on, on simulated engines."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import aseer
from aseer.config import POLICY_NAMES
from tests.integration.sims import config_of, content, groups_of


async def test_every_request_yields_one_response(engine):
    rollout = engine.rollout(groups_of(12, n=5))
    responses = [r async for r in rollout]
    assert Counter(r.group_id for r in responses) == {f"g{i}": 5 for i in range(12)}
    assert len({r.request_id for r in responses}) == 60
    for r in responses:
        assert len(r.logprobs) == len(r.token_ids) == len(r.text)
        assert r.finish_reason == ("stop" if r.token_ids[-1] < 4 else "length")
        assert r.stop_reason == (r.token_ids[-1] if r.finish_reason == "stop" else None)
    report = rollout.report
    assert report.num_responses == 60
    assert report.num_output_tokens == sum(len(r.token_ids) for r in responses)
    assert report.num_preemptions == 0
    assert report.throughput_tok_s > 0


async def test_chunks_and_migrations_change_nothing(engine):
    groups = groups_of(10)
    undivided = [r async for r in engine.rollout(groups, chunk_size=0)]
    rollout = engine.rollout(groups, chunk_size=32)
    divided = [r async for r in rollout]
    assert rollout.report.num_chunks > rollout.report.num_responses
    assert content(divided) == content(undivided)


@pytest.mark.parametrize("policy", POLICY_NAMES)
async def test_every_policy_completes_the_same_work(engine, policy):
    groups = groups_of(6)
    reference = [r async for r in engine.rollout(groups, policy="fcfs", chunk_size=0)]
    lengths = {r.request_id: len(r.token_ids) for r in reference}
    groups = [
        replace(g, known_lengths=[lengths[f"{g.group_id}/{i}"] for i in range(g.n)])
        for g in groups
    ]
    responses = [r async for r in engine.rollout(groups, policy=policy)]
    assert content(responses) == content(reference)


async def test_the_policy_that_needs_lengths_says_so(engine):
    with pytest.raises(aseer.ConfigError, match=r"'g0': .*orders.*known_lengths"):
        engine.rollout(groups_of(1), policy="longest-first")


@pytest.mark.parametrize("length_priors", [False, True])
async def test_the_next_rollout_of_the_same_prompts_starts_with_the_longest(
    length_priors,
):
    """An instance that runs one request at a time, so that order is completion."""
    config = config_of(
        num_instances=1,
        max_num_seqs=1,
        chunk_size=0,
        length_priors=length_priors,
        starvation_interval=0,
    )
    async with aseer.Engine(config) as engine:
        first = [r async for r in engine.rollout(groups_of(5, n=2))]
        second = [r async for r in engine.rollout(groups_of(5, n=2))]
    assert content(second) == content(first)
    lengths = {r.group_id: len(r.token_ids) for r in first}
    assert len(set(lengths.values())) > 2
    order = [lengths[r.group_id] for r in second]
    if length_priors:
        assert order == sorted(order, reverse=True)
    else:  # probes in the order of the groups, then the longest group's
        assert [r.group_id for r in second[:5]] == [f"g{i}" for i in range(5)]


async def test_groups_come_whole_and_in_order_of_members(engine):
    seen = [
        [(r.group_id, r.index) for r in group]
        async for group in engine.rollout(groups_of(5, n=3)).by_group()
    ]
    assert sorted(seen) == [[(f"g{i}", k) for k in range(3)] for i in range(5)]


async def test_metadata_comes_back_untouched(engine):
    marker = object()
    group = aseer.Group([1, 2], n=2, metadata=marker, sampling={"max_tokens": 5})
    assert [r.metadata async for r in engine.rollout([group])] == [marker, marker]


async def test_an_async_iterator_may_wait_for_responses_before_it_goes_on(engine):
    wanted = asyncio.Queue()

    async def refill():
        for group in groups_of(4):
            yield group
            await wanted.get()

    seen = []
    async for group in engine.rollout(refill()).by_group():
        seen.append(group[0].group_id)
        wanted.put_nowait(None)
    assert seen == ["g0", "g1", "g2", "g3"]


async def test_an_endless_iterator_is_taken_only_as_far_as_needed():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield aseer.Group([taken % 500], n=4, sampling={"max_tokens": 8})

    async with aseer.Engine(config_of(max_pending_requests=40)) as engine:
        num = 0
        async for _ in engine.rollout(endless()):
            num += 1
            if num == 100:
                break
    assert taken <= (100 + 40) // 4 + 1


async def test_a_bad_group_in_a_list_runs_nothing(engine):
    groups = [*groups_of(2), aseer.Group([], group_id="empty")]
    with pytest.raises(ValueError, match=r"group 'empty'.*empty.*at least one token"):
        engine.rollout(groups)


async def test_settings_in_numpys_numbers_reach_the_engines(engine):
    sampling = {
        "temperature": np.float64(0.8),
        "top_k": np.int64(5),
        "max_tokens": np.int32(8),
        "seed": np.uint64(3),
        "stop_token_ids": np.array([1, 2]),
        "stop": [np.str_("x")],
        "ignore_eos": np.True_,
    }
    group = aseer.Group(np.array([5, 6]), np.int64(2), sampling, np.str_("a"))
    responses = [r async for r in engine.rollout([group])]
    assert [len(r.token_ids) for r in responses] == [8, 8]
    assert {r.group_id for r in responses} == {"a"}


async def test_ids_that_are_made_and_ids_that_are_given_live_together(engine):
    groups = [
        aseer.Group([5], n=1, sampling={"max_tokens": 4}, group_id=group_id)
        for group_id in ("group-1", None, None, "group-3", None)
    ]
    for source in (groups, iter(groups[:3])):
        responses = [r async for r in engine.rollout(source)]
        assert len({r.group_id for r in responses}) == len(responses)
        assert len(responses) in (3, 5)


async def test_what_is_no_list_of_groups_is_refused_and_the_engine_goes_on(engine):
    (group,) = groups_of(1, n=1)
    for wrong in (group, None, "prompt", {"prompt": [1]}, [[1, 2]]):
        with pytest.raises(aseer.ConfigError, match=r"aseer.Group|give \[group\]"):
            engine.rollout(wrong)
    rollout = engine.rollout([group])
    with pytest.raises(aseer.ConfigError, match="group_id=7 is a int; give a str"):
        rollout.cancel(7)
    assert len([r async for r in rollout]) == 1


@pytest.mark.parametrize("level", [0, 3, True, "1", 1 << 70])
async def test_a_level_of_sleep_that_there_is_not_is_refused(engine, level):
    with pytest.raises(aseer.ConfigError, match=r"level=.* give 1, .*or 2"):
        await engine.sleep(level)


async def test_a_level_of_sleep_may_be_numpys(engine):
    await engine.sleep(np.int64(1))
    await engine.wake()
    assert len([r async for r in engine.rollout(groups_of(1, n=2))]) == 2


async def test_a_bad_group_in_an_iterator_loses_nothing_before_it(engine):
    groups = iter([*groups_of(2), aseer.Group([1], n=0, group_id="bad")])
    responses = []
    with pytest.raises(aseer.ConfigError, match=r"group 'bad': n=0"):
        async for response in engine.rollout(groups):
            responses.append(response)
    assert len(responses) == 8


async def test_an_error_in_the_users_iterator_reaches_him_after_the_responses(engine):
    async def broken():
        for group in groups_of(2):
            yield group
        raise KeyError("mine")

    responses = []
    with pytest.raises(KeyError, match="mine"):
        async for response in engine.rollout(broken()):
            responses.append(response)
    assert len(responses) == 8


async def test_a_cancelled_group_ends_early_with_what_it_has(engine):
    long = groups_of(3, n=4, ignore_eos=True, max_tokens=3000)
    rollout = engine.rollout([*long, *groups_of(4, n=1, max_tokens=5)[3:]])
    responses = []
    async for response in rollout:
        responses.append(response)
        if response.group_id == "g3":
            for group in long:
                rollout.cancel(group.group_id)
    reasons = Counter((r.group_id, r.finish_reason) for r in responses[1:])
    assert reasons == {(f"g{i}", "aborted"): 4 for i in range(3)}


async def test_a_cancelled_groups_tokens_are_a_prefix_of_its_full_response(engine):
    groups = groups_of(2, n=2, ignore_eos=True, max_tokens=400)
    full = content([r async for r in engine.rollout(groups)])
    rollout = engine.rollout([*groups, *groups_of(9, n=1, max_tokens=40)[2:]])
    aborted = []
    async for response in rollout:
        if response.group_id not in ("g0", "g1"):
            rollout.cancel("g0")
        elif response.finish_reason == "aborted":
            aborted.append(response)
    assert len(aborted) == 2
    for response in aborted:
        tokens, logprobs, text = full[response.request_id]
        num = len(response.token_ids)
        assert 0 < num < 400
        assert (tokens[:num], logprobs[:num]) == (
            response.token_ids,
            response.logprobs,
        )
        assert text[:num] == response.text


async def test_cancelling_an_unknown_group_says_so(engine):
    rollout = engine.rollout(groups_of(1))
    with pytest.raises(ValueError, match=r"no group 'nope' among the 1"):
        rollout.cancel("nope")
    assert len([r async for r in rollout]) == 4


async def test_code_that_blocks_its_loop_does_not_stall_the_engines(engine):
    long = groups_of(8, ignore_eos=True, max_tokens=2000)
    rollout = engine.rollout([*long, *groups_of(9, n=1, max_tokens=5)[8:]])
    iterator = aiter(rollout)
    await anext(iterator)
    before = rollout.progress().num_output_tokens
    time.sleep(0.5)  # noqa: ASYNC251 - a reward function that blocks
    after = rollout.progress().num_output_tokens
    assert after - before > 1000  # the sim makes 64 tokens a millisecond at most
    assert len([r async for r in iterator]) == 32


async def test_one_rollout_at_a_time(engine):
    long = groups_of(4, max_tokens=2000, ignore_eos=True)
    first = aiter(engine.rollout(groups_of(1) + long[1:]))
    await anext(first)
    with pytest.raises(aseer.RolloutInProgressError, match="unfinished requests"):
        async for _ in engine.rollout(groups_of(1)):
            pass
    assert len([r async for r in first]) == 15


async def test_a_rollout_that_waits_for_groups_is_told_as_that(engine):
    more = asyncio.Event()

    async def groups():
        yield groups_of(1)[0]
        await more.wait()

    first = aiter(engine.rollout(groups()))
    for _ in range(4):
        await anext(first)
    waits = r"that waits for groups is in progress; iterate it to its end first"
    with pytest.raises(aseer.RolloutInProgressError, match=f"{waits}$"):
        await engine.sleep()
    with pytest.raises(aseer.RolloutInProgressError, match=f"{waits}, or give pause="):
        await engine.update_weights({})
    more.set()
    assert [r async for r in first] == []


async def test_the_module_function_uses_the_engine_that_is_open_here(engine):
    token = aseer.runtime.engine.current_engine.set(engine)
    try:
        assert len([r async for r in aseer.rollout(groups_of(2))]) == 8
    finally:
        aseer.runtime.engine.current_engine.reset(token)


async def test_the_module_function_opens_an_engine_for_a_config():
    responses = [r async for r in aseer.rollout(groups_of(2), config=config_of())]
    assert len(responses) == 8


async def test_without_an_engine_the_module_function_says_what_to_do():
    with pytest.raises(aseer.EngineClosedError, match="engine= or config="):
        async for _ in aseer.rollout(groups_of(1)):
            pass


def test_the_synchronous_form_needs_no_event_loop():
    with aseer.Engine(config_of()) as engine:
        rollout = engine.rollout_sync(groups_of(4))
        assert len(list(rollout)) == 16
        assert rollout.report.num_responses == 16
        groups = list(engine.rollout_sync(iter(groups_of(3))).by_group())
        assert sorted(len(g) for g in groups) == [4, 4, 4]
        for _ in engine.rollout_sync(groups_of(4)):
            break
        assert len(list(engine.rollout_sync(groups_of(4)))) == 16


def test_the_synchronous_form_refuses_groups_that_need_an_event_loop():
    async def produce():
        yield groups_of(1)[0]

    with aseer.Engine(config_of()) as engine:
        with pytest.raises(aseer.ConfigError, match="needs `async for`"):
            engine.rollout_sync(produce())
        assert len(list(engine.rollout_sync(groups_of(1)))) == 4


def test_a_closed_engine_says_so():
    engine = aseer.Engine(config_of())
    with pytest.raises(aseer.EngineClosedError, match="async with aseer"):
        engine.rollout(groups_of(1))


async def test_seeds_repeat_samples_and_tell_members_apart(engine):
    groups = groups_of(3, n=4, temperature=1.0, seed=7)
    first = content([r async for r in engine.rollout(groups)])
    again = content([r async for r in engine.rollout(groups)])
    assert first == again
    texts = [text for _, _, text in first.values()]
    assert len(set(texts)) == len(texts)
