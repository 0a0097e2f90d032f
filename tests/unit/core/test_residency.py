"""Where the KV of waiting requests probably is: blocks of 4, caches of 10 blocks."""

from __future__ import annotations

import pytest

from aseer.core.residency import NO_POOL, NOWHERE, Holders, KvResidency
from aseer.types import InstanceId, RequestId

A, B = InstanceId(0), InstanceId(1)
X, Y, Z = RequestId("x"), RequestId("y"), RequestId("z")


@pytest.fixture
def kv() -> KvResidency:
    kv = KvResidency()
    kv.add_instance(A, num_blocks=10, block_size=4)
    kv.add_instance(B, num_blocks=10, block_size=4)
    return kv


def held(kv: KvResidency, request: RequestId) -> dict[InstanceId, int]:
    """Tokens that instances hold themselves."""
    return dict(kv.holders(request).tokens)


def run(kv: KvResidency, where: InstanceId, request: RequestId, tokens: int) -> None:
    """A chunk that ends with that many tokens computed."""
    num_blocks = -(-tokens // 4)
    kv.reserve(where, request, num_blocks)
    kv.release(where, request, num_blocks, tokens)


def test_whole_blocks_stay_where_a_chunk_ran(kv: KvResidency) -> None:
    run(kv, A, X, 11)
    assert held(kv, X) == {A: 8}


def test_a_request_may_have_kv_on_several_instances(kv: KvResidency) -> None:
    run(kv, A, X, 8)
    run(kv, B, X, 16)
    assert held(kv, X) == {A: 8, B: 16}


def test_running_again_where_it_was_replaces_what_is_there(kv: KvResidency) -> None:
    run(kv, A, X, 8)
    run(kv, A, X, 16)
    assert held(kv, X) == {A: 16}


def test_new_reservations_push_out_the_oldest_first(kv: KvResidency) -> None:
    for request in (X, Y, Z):
        run(kv, A, request, 12)  # 3 blocks each: 9 of 10 cached
    kv.reserve(A, RequestId("new"), 2)
    assert [held(kv, r) for r in (X, Y, Z)] == [{}, {A: 12}, {A: 12}]
    kv.reserve(A, RequestId("newer"), 4)
    assert [held(kv, r) for r in (X, Y, Z)] == [{}, {}, {A: 12}]


def test_a_resumed_request_uses_its_own_blocks_and_pushes_nobody_out(
    kv: KvResidency,
) -> None:
    run(kv, A, X, 12)
    run(kv, A, Y, 24)  # 3 + 6 blocks cached
    kv.reserve(A, X, 4)  # its 3 and one more: 4 + 6
    assert held(kv, Y) == {A: 24}


def test_a_finished_request_leaves_nothing(kv: KvResidency) -> None:
    run(kv, A, X, 12)
    kv.reserve(B, X, 4)
    kv.release(B, X, 4, num_tokens=0)
    kv.forget(X)
    assert held(kv, X) == {}


def test_a_forgotten_requests_room_is_free_again(kv: KvResidency) -> None:
    run(kv, A, X, 24)
    kv.forget(X)
    run(kv, A, Y, 12)
    kv.reserve(A, Z, 7)  # 7 + 3 = 10
    assert held(kv, Y) == {A: 12}


def test_a_lost_instance_holds_nothing(kv: KvResidency) -> None:
    run(kv, A, X, 8)
    run(kv, B, X, 8)
    kv.drop_instance(A)
    assert held(kv, X) == {B: 8}


def test_an_instance_that_came_back_is_empty(kv: KvResidency) -> None:
    run(kv, A, X, 8)
    kv.add_instance(A, num_blocks=10, block_size=4)
    assert held(kv, X) == {}
    run(kv, A, Y, 40)
    assert held(kv, Y) == {A: 40}


def test_a_chunk_that_ends_after_its_instance_was_lost_changes_nothing(
    kv: KvResidency,
) -> None:
    kv.reserve(A, X, 2)
    kv.drop_instance(A)
    kv.release(A, X, 2, 8)
    assert held(kv, X) == {}


def test_a_chunk_lost_with_its_instance_is_not_counted_when_it_is_back(
    kv: KvResidency,
) -> None:
    kv.reserve(A, X, 10)
    kv.add_instance(A, num_blocks=10, block_size=4)
    run(kv, A, Y, 40)
    assert held(kv, Y) == {A: 40}


def test_dropping_an_unknown_instance_is_nothing(kv: KvResidency) -> None:
    kv.drop_instance(InstanceId(7))


# A pool beside the caches


def one_pool(kv: KvResidency, granularity: int = 8, price: float = 0.25) -> None:
    kv.use_pool(granularity, lambda instance_id: 0)
    kv.set_prices(price, 1.0)


def test_what_was_computed_is_in_the_pool_for_all_at_a_discount(kv: KvResidency):
    one_pool(kv)
    run(kv, A, X, 21)
    # 16 of 21 tokens are whole chunks; A has 20 in its own cache.
    assert kv.holders(X) == Holders({A: 20}, num_pooled=12, pool=0)


def test_what_an_instance_holds_itself_counts_if_it_is_more_than_the_pools(
    kv: KvResidency,
):
    one_pool(kv, price=0.0)
    run(kv, A, X, 16)
    assert kv.holders(X) == Holders({}, num_pooled=16, pool=0)


def test_an_evicted_request_is_still_in_the_pool(kv: KvResidency):
    one_pool(kv, price=0.5)
    run(kv, A, X, 16)
    kv.reserve(A, Y, 10)
    assert kv.holders(X) == Holders({}, num_pooled=8, pool=0)


def test_a_request_is_in_the_pool_of_the_instance_that_ran_it_last(kv: KvResidency):
    kv.use_pool(8, int)
    kv.set_prices(0.5, 1.0)
    run(kv, A, X, 16)
    assert kv.holders(X) == Holders({A: 16}, num_pooled=8, pool=0)
    run(kv, B, X, 24)
    assert kv.holders(X) == Holders({A: 16, B: 24}, num_pooled=12, pool=1)


def test_a_pool_is_worth_less_on_other_nodes_than_the_one_that_stored():
    kv = KvResidency()
    kv.use_pool(8, lambda instance_id: 0)
    kv.set_prices(0.25, 0.5)
    for i, node in enumerate((0, 0, 1)):
        kv.add_instance(InstanceId(i), num_blocks=10, block_size=4, node=node)
    run(kv, A, X, 16)
    assert kv.holders(X) == Holders({A: 16}, 12, pool=0, num_far=8, node=0)
    run(kv, InstanceId(2), X, 24)
    # A's own 16 are more than what the pool on the other node is worth there.
    own = {A: 16, InstanceId(2): 24}
    assert kv.holders(X) == Holders(own, 18, pool=0, num_far=12, node=1)


def test_an_instance_without_a_pool_stores_nowhere():
    kv = KvResidency()
    kv.use_pool(8, lambda instance_id: 0 if instance_id == A else NO_POOL)
    kv.set_prices(0.5, 1.0)
    for i in range(3):
        kv.add_instance(InstanceId(i), num_blocks=10, block_size=4, node=i)
    run(kv, B, X, 16)
    assert kv.holders(X) == Holders({B: 16})
    run(kv, A, X, 16)
    run(kv, B, X, 24)
    assert kv.holders(X) == Holders({A: 16, B: 24}, num_pooled=8, pool=0)


def test_a_pool_may_be_found_when_instances_are_up_already(kv: KvResidency):
    one_pool(kv)
    kv.add_instance(InstanceId(2), num_blocks=10, block_size=4)
    assert {kv.pool_of(InstanceId(i)) for i in range(3)} == {0}


def test_holders_do_not_grow_with_the_instances_of_a_pool():
    kv = KvResidency()
    kv.use_pool(8, lambda instance_id: 0)
    for i in range(1000):
        kv.add_instance(InstanceId(i), num_blocks=10, block_size=4)
    run(kv, A, X, 16)
    assert len(kv.holders(X).tokens) == 1


def test_a_finished_request_is_nowhere(kv: KvResidency):
    one_pool(kv)
    run(kv, A, X, 16)
    kv.forget(X)
    assert kv.holders(X) == NOWHERE


# What cannot be meant


def test_a_price_is_a_share(kv: KvResidency):
    with pytest.raises(ValueError, match="between 0 and 1"):
        kv.set_prices(1.5, 0.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        kv.set_prices(0.0, 1.5)


def test_a_pool_that_cannot_be_told_changes_nothing(kv: KvResidency):
    def no_server(instance_id: InstanceId) -> int:
        raise LookupError(instance_id)

    with pytest.raises(LookupError):
        kv.use_pool(8, no_server)
    run(kv, A, X, 16)
    assert kv.holders(X) == Holders({A: 16})


def test_a_piece_takes_blocks_of_every_group_of_layers() -> None:
    kv = KvResidency()
    kv.add_instance(A, num_blocks=13, block_size=4, blocks_each=3)
    kv.reserve(A, X, 7)  # of what is reserved each started piece counts
    kv.release(A, X, 7, 8)
    assert kv.holders(X).tokens == {A: 8}
    kv.reserve(A, Y, 7)  # 3 of 4 pieces
    assert kv.holders(X).tokens == {}
    kv.release(A, Y, 7, 9)
    assert kv.holders(Y).tokens == {A: 8}


def test_without_a_prefix_cache_nothing_is_held() -> None:
    kv = KvResidency()
    kv.add_instance(A, num_blocks=0, block_size=4)
    run(kv, A, X, 12)
    assert kv.holders(X).tokens == {}
    kv.use_pool(4, lambda _: 0)
    run(kv, A, X, 12)
    held = kv.holders(X)
    assert held.tokens == {}
    assert held.num_pooled > 0
