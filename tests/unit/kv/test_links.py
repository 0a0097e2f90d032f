"""When KV is pulled from another node, and when it is not."""

from __future__ import annotations

from aseer.kv.links import MAX_PULLS, Link


def link_with(token_s: float) -> Link:
    """One that has pulled a thousand tokens at time 0."""
    link = Link()
    link.begin(0.0)
    assert not link.over(1000, 1000 * token_s, "", 0.0)
    return link


def test_what_is_not_known_is_tried():
    assert Link().pays(1 << 20, 1e-9, 0.0)
    assert Link().pays(1, None, 0.0)


def test_it_pays_where_computing_takes_longer():
    link = link_with(1e-4)
    assert link.token_s == 1e-4
    assert link.pays(1000, 2e-4, 1.0)
    assert link.pays(1000, None, 1.0)
    assert not link.pays(1000, 1e-4, 1.0)


def test_what_would_not_be_there_in_time_is_not_begun():
    link = link_with(1e-3)
    assert link.pays(1500, 1.0, 1.0)
    assert not link.pays(1501, 1.0, 1.0)


def test_what_does_not_pay_is_tried_again_once_in_a_while():
    link = link_with(1e-3)
    assert not link.pays(1000, 1e-4, 299.0)
    assert link.pays(1000, 1e-4, 300.0)
    link.begin(300.0)
    link.over(1000, 0.01, "", 300.1)
    assert link.token_s is not None
    assert link.token_s < 1e-3
    assert not link.pays(1000, 1e-4, 301.0)


def test_no_more_is_begun_than_can_go_at_once():
    link = Link()
    for _ in range(MAX_PULLS):
        assert link.pays(1, None, 0.0)
        link.begin(0.0)
    assert not link.pays(1, None, 0.0)
    link.over(1, 0.1, "", 0.1)
    assert link.pays(1, None, 0.1)


def test_a_way_that_brings_nothing_is_left_alone_for_longer_and_longer():
    link, now = Link(), 0.0
    for pause in (5.0, 10.0, 20.0, 40.0, 80.0, 120.0, 120.0):
        assert link.pays(1, None, now)
        for _ in range(2):  # at once: they count as one
            link.begin(now)
        assert link.over(0, 2.0, "it took too long", now)
        assert link.over(0, 2.0, "it took too long", now)
        assert not link.pays(1, None, now + pause - 0.1)
        now += pause
    link.begin(now)
    assert not link.over(1, 0.1, "", now)
    link.begin(now)
    assert link.over(0, 2.0, "it is gone", now)
    assert link.pays(1, None, now + 5.0)


def test_what_came_in_part_is_learnt_and_no_failure():
    link = Link()
    link.begin(0.0)
    assert not link.over(100, 2.0, "it took longer than 2 s", 2.0)
    assert link.token_s == 0.02
    assert link.pays(70, None, 2.0)
    assert not link.pays(100, None, 2.0)
