"""What a pool server counts is what LMCache did, whatever the order of its calls."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from aseer.kv.ledger import Ledger


class Key(NamedTuple):
    """Of LMCache's `ObjectKey` what the ledger reads."""

    name: str
    cache_salt: str = "run-v0"


A, B, C = (Key(name) for name in "abc")
SIZE = 100


def counts(ledger: Ledger, object_bytes: int = SIZE) -> dict[str, int]:
    """Those that are not 0."""
    found = ledger.counts(1000, object_bytes)
    named = {name: getattr(found, name) for name in found.__struct_fields__}
    return {name: num for name, num in named.items() if num}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_what_is_deleted_for_want_of_room_was_evicted_and_what_we_delete_was_freed(
    ledger: Ledger,
) -> None:
    ledger.on_l1_keys_write_finished([A, B, C])
    ledger.on_l1_keys_deleted_by_manager([A])
    ledger.begin_freeing([B])
    ledger.on_l1_keys_deleted_by_manager([B])
    ledger.end_freeing()
    # LMCache may evict at the same moment what was to be freed, and says so once.
    ledger.on_l1_keys_deleted_by_manager([B])
    ledger.on_l1_keys_deleted_by_manager([C])
    assert counts(ledger) == {
        "stored": 300,
        "evicted": 200,
        "freed": 100,
        "capacity": 1000,
        "per_chunk": 100,
    }


def test_a_key_evicted_while_others_are_freed_counts_as_evicted(
    ledger: Ledger,
) -> None:
    ledger.on_l1_keys_write_finished([A, B])
    ledger.begin_freeing([A])
    ledger.on_l1_keys_deleted_by_manager([B, A])
    found = counts(ledger)
    assert (found["evicted"], found["freed"]) == (100, 100)


def test_what_was_to_be_freed_and_stayed_may_be_evicted_later(ledger: Ledger) -> None:
    """LMCache frees nothing that is being read."""
    ledger.on_l1_keys_write_finished([A])
    ledger.begin_freeing([A])
    ledger.end_freeing()
    ledger.on_l1_keys_deleted_by_manager([A])
    found = counts(ledger)
    assert found["evicted"] == 100
    assert "freed" not in found


def test_what_is_loaded_from_the_disk_is_read_and_not_stored_again(
    ledger: Ledger,
) -> None:
    ledger.on_l1_keys_write_finished([A])
    ledger.on_l2_keys_stored([A], [90])
    ledger.on_l1_keys_deleted_by_manager([A])
    assert ledger.held({A, B}) == ([], [A])
    ledger.on_l1_keys_finish_write_and_reserve_read([A])
    assert ledger.held({A, B}) == ([A], [A])
    found = counts(ledger)
    assert (found["stored"], found["disk_read"], found["resident"]) == (100, 100, 100)
    assert (found["disk_written"], found["disk_resident"]) == (90, 90)
    ledger.on_l2_keys_deleted([A, B])
    found = counts(ledger)
    assert "disk_resident" not in found
    assert found["disk_written"] == 90, "it was written all the same"


def test_a_size_that_is_known_once_stays_known_when_dram_is_empty(
    ledger: Ledger,
) -> None:
    ledger.on_l1_keys_write_finished([A])
    assert counts(ledger, 0) == {"capacity": 1000}, "nobody knows a chunk's size yet"
    assert ledger.any_in_dram() == A
    assert counts(ledger)["stored"] == 100
    ledger.on_l1_keys_deleted_by_manager([A])
    assert ledger.any_in_dram() is None
    assert counts(ledger, 0)["evicted"] == 100


def test_keys_of_older_weights_are_found_in_every_tier(ledger: Ledger) -> None:
    old, older = Key("a", "run-v1"), Key("b", "run-v0")
    new, strange = Key("c", "run-v2"), Key("d", "somebody-else's")
    ledger.on_l1_keys_write_finished([old, new, strange])
    ledger.on_l2_keys_stored([older, new], [90, 90])
    assert ledger.older_than(2) == {old, older}
    assert ledger.older_than(0) == set()
