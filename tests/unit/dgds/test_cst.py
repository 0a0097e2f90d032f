"""The suffix forest: what it answers, forgets, refuses and learns."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from aseer.dgds.cst import PROMPT_WRITER, RequestHandle, SuffixForest, SuffixTree

if TYPE_CHECKING:
    from collections.abc import Sequence


def handles(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


def limits(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


def drafted(tree: SuffixTree, request: RequestHandle, size: int = 8) -> list[int]:
    return [token for token, _ in tree.draft(request, size)]


def test_draft_copies_from_the_prompt() -> None:
    tree = SuffixTree([1, 2, 3, 4, 5, 6])
    request = tree.open()
    tree.append(request, [2, 3])
    assert drafted(tree, request, 3) == [4, 5, 6]


def test_context_spans_the_end_of_the_prompt() -> None:
    tree = SuffixTree([7, 8])
    first, second = tree.open(), tree.open()
    tree.append(first, [9, 10])
    assert tree.orders(second)[0].match_length == 2
    assert drafted(tree, second, 2) == [9, 10]


def test_prompt_counts_once_however_many_requests_share_it() -> None:
    tree = SuffixTree([1, 2, 1])
    requests = [tree.open() for _ in range(5)]
    (order,) = tree.orders(requests[0])
    assert order.continuations == [(2, 1, PROMPT_WRITER)]
    assert tree.forest.num_tokens == 3


def test_no_context_spans_two_requests() -> None:
    tree = SuffixTree()
    first, second, third = (tree.open() for _ in range(3))
    tree.append(first, [1, 2])
    tree.append(second, [3, 4])
    tree.append(third, [2])
    assert tree.orders(third) == []
    assert tree.draft(third, 4) == []


def test_siblings_history_is_followed_and_writers_are_told_apart() -> None:
    tree = SuffixTree()
    first, second, third = (tree.open() for _ in range(3))
    for writer in (first, second):
        tree.append(writer, [5, 6, 7])
    tree.append(third, [5, 6])
    assert tree.orders(third)[0].continuations == [(7, 2, 0b011)]


def test_interleaving_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 3, (4, 60))
    whole, stepwise = SuffixTree([1, 2]), SuffixTree([1, 2])
    a = [whole.open() for _ in texts]
    b = [stepwise.open() for _ in texts]
    for request, text in zip(a, texts, strict=True):
        whole.append(request, text.tolist())
    for column in texts.T:
        for request, token in zip(b, column.tolist(), strict=True):
            stepwise.append(request, [token])
    for left, right in zip(a, b, strict=True):
        assert whole.orders(left) == stepwise.orders(right)
        assert whole.draft(left, 8) == stepwise.draft(right, 8)


def test_closing_a_request_undoes_it() -> None:
    kept, mixed = SuffixTree([1]), SuffixTree([1])
    a, b, gone = kept.open(), mixed.open(), mixed.open()
    for chunk in ([2, 3], [1, 2], [4, 1]):
        kept.append(a, chunk)
        mixed.append(gone, [2, 9, 2])
        mixed.append(b, chunk)
    mixed.close(gone)
    assert mixed.orders(b) == kept.orders(a)
    with pytest.raises(KeyError):
        mixed.append(gone, [1])
    again = mixed.open()
    mixed.append(again, [2])
    assert drafted(mixed, again, 1) == [3]


def test_closing_a_group_frees_its_memory_and_requests() -> None:
    forest = SuffixForest()
    assert forest.memory_bytes == 0
    group = forest.open_group(limits(1, 2, 3))
    request = forest.open_request(group)
    forest.append(handles(request), np.arange(1000, dtype=np.int32), handles(0, 1000))
    assert forest.memory_bytes > 1000
    forest.close_group(group)
    assert (forest.memory_bytes, forest.num_tokens, forest.num_groups) == (0, 0, 0)
    with pytest.raises(KeyError):
        forest.tokens(request)


def test_rows_that_come_twice_late_or_with_a_gap_change_nothing() -> None:
    forest = SuffixForest()
    request = forest.open_request(forest.open_group(limits()))
    row = handles(request)

    def append(tokens: list[int], start: int) -> int:
        offsets = handles(0, len(tokens))
        return int(forest.append(row, limits(*tokens), offsets, handles(start))[0])

    assert append([1, 2, 3], 0) == 3
    assert append([2, 3], 1) == 3
    assert append([9], 5) == 3
    assert append([3, 4], 2) == 4
    assert forest.tokens(request).tolist() == [1, 2, 3, 4]
    assert forest.tokens(request, 2).tolist() == [3, 4]


def test_following_a_table_takes_what_is_new_of_each_row() -> None:
    forest = SuffixForest()
    rows = handles(*(forest.open_request(forest.open_group(limits(9))) for _ in "ab"))
    table = np.array([[9, 1, 2, 3, 0, 0], [9, 4, 5, 6, 0, 0]], np.int32)[:, :5]

    def follow(num_tokens: list[int]) -> int:
        return forest.follow(
            rows, table, handles(1, 0), handles(1, 1), limits(*num_tokens)
        )

    assert follow([3, 2]) == 0
    assert [forest.tokens(row).tolist() for row in rows] == [[4], [1, 2]]
    assert follow([3, 4]) == 0
    assert [forest.tokens(row).tolist() for row in rows] == [[4, 5, 6], [1, 2]]
    # A row that has become shorter has another text.
    assert follow([4, 2]) == 1
    assert [forest.tokens(row).tolist() for row in rows] == [[4, 5, 6], [1, 2, 3]]


def test_following_a_bad_table_raises_and_changes_nothing() -> None:
    forest = SuffixForest()
    request = handles(forest.open_request(forest.open_group(limits(9))))
    table = np.array([[9, 1, -2]], np.int32)
    for rows, starts, num_tokens, message in (
        (handles(1), handles(1), limits(2), "in the table"),
        (handles(0), handles(-1), limits(2), "starts"),
        (handles(0), handles(1), limits(4), "fewer"),
        (handles(0), handles(1), limits(3), "negative"),
        (handles(0, 0), handles(1), limits(2), "as long"),
    ):
        with pytest.raises(ValueError, match=message):
            forest.follow(request, table, rows, starts, num_tokens)
    with pytest.raises(TypeError, match="int32"):
        forest.follow(request, table[0], handles(0), handles(1), limits(2))
    assert forest.tokens(request[0]).tolist() == []


def test_batch_rows_are_independent() -> None:
    forest = SuffixForest()
    groups = [forest.open_group(limits(base, base + 1, base)) for base in (10, 20)]
    rows = handles(*(forest.open_request(group) for group in groups))
    drafts = forest.draft(rows, limits(0, 2))
    assert drafts.offsets.tolist() == [0, 0, 2]
    assert drafts.tokens.tolist() == [21, 20]


def test_confidence_falls_along_a_path_and_cuts_it() -> None:
    tree = SuffixTree([1, 2, 3, 4] * 5)
    request = tree.open()
    confidences = [confidence for _, confidence in tree.draft(request, 8)]
    assert len(confidences) == 8
    assert all(0 < x <= 1 for x in confidences)
    assert confidences == sorted(confidences, reverse=True)
    bar = confidences[3] - 1e-6
    assert len(tree.draft(request, 8, min_confidence=bar)) == 4


def test_forecasts_that_come_true_are_kept_until_one_does_not() -> None:
    tree = SuffixTree([1, 2, 3, 4, 5])
    reader, sibling = tree.open(), tree.open()
    tree.append(reader, [1])
    first = tree.draft(reader, 3)
    assert [token for token, _ in first] == [2, 3, 4]
    for _ in range(9):
        tree.append(sibling, [2, 3, 7, 2, 8])
    tree.append(reader, [2])
    kept = tree.draft(reader, 4)
    assert [token for token, _ in kept[:2]] == [3, 4]
    # Of its path without the token that came.
    assert kept[0][1] == pytest.approx(first[1][1] / first[0][1])
    tree.append(reader, [3, 7])
    assert drafted(tree, reader, 1) == [2]


def test_closing_a_sibling_ends_what_its_text_had_forecast() -> None:
    tree = SuffixTree()
    reader, sibling = tree.open(), tree.open()
    tree.append(sibling, [1, 2, 3, 4])
    tree.append(reader, [1])
    assert drafted(tree, reader, 3) == [2, 3, 4]
    tree.close(sibling)
    assert tree.draft(reader, 3) == []


def test_forecasts_wait_while_a_request_does_not_draft() -> None:
    tree = SuffixTree([1, 2, 3, 4, 5])
    request = tree.open()
    tree.append(request, [1])
    long = tree.draft(request, 4)
    assert tree.draft(request, 0) == []
    assert tree.draft(request, 2) == long[:2]
    assert tree.draft(request, 4) == long


def drafted_after(forest: SuffixForest, prompt: Sequence[int]) -> float:
    """Confidence of the token that follows the first of a new group's prompt."""
    request = forest.open_request(forest.open_group(np.array(prompt, np.int32)))
    forest.append(handles(request), np.array(prompt[:1], np.int32), handles(0, 1))
    return float(forest.draft(handles(request), limits(1)).confidences[0])


def deceive(forest: SuffixForest, prompt: Sequence[int], times: int) -> None:
    """Have what follows the first of a prompt forecast, and never come."""
    for i in range(times):
        group = forest.open_group(np.array(prompt, np.int32))
        request = handles(forest.open_request(group))
        forest.append(request, np.array(prompt[:1], np.int32), handles(0, 1))
        forest.draft(request, limits(1))
        forest.append(request, np.array([100 + i], np.int32), handles(0, 1))


def test_confidence_learns_what_is_accepted() -> None:
    forest = SuffixForest()
    trusting = drafted_after(forest, [1, 2, 3, 4])
    deceive(forest, [5, 6, 7, 8], times=200)
    assert drafted_after(forest, [9, 10, 11, 12]) < trusting


@pytest.mark.parametrize("doubted", [(21, 6), (5, 22)])
def test_a_token_that_deceived_is_doubted_elsewhere(doubted: tuple[int, int]) -> None:
    """One that did not come, and one after which another did."""
    forest = SuffixForest()
    deceive(forest, [5, 6], times=50)
    assert drafted_after(forest, doubted) < 0.8 * drafted_after(forest, (21, 22))


def test_tree_of_paths_holds_the_branches_and_the_best_path() -> None:
    tree = SuffixTree()
    writers = [tree.open() for _ in range(3)]
    for writer, text in zip(writers, ([1, 2, 3], [1, 2, 4], [1, 5, 6]), strict=True):
        tree.append(writer, text)
    reader = tree.open()
    tree.append(reader, [1])
    paths = tree.forest.draft_tree(handles(reader), limits(2), top_k=3)
    nodes = list(zip(paths.tokens.tolist(), paths.parents.tolist(), strict=True))
    assert nodes[:2] == [(2, -1), (5, -1)]
    assert {(3, 0), (4, 0), (6, 1)} == set(nodes[2:])
    assert drafted(tree, reader, 2) == [2, 3]


def test_repetition_costs_no_more_than_text() -> None:
    tree = SuffixTree()
    request = tree.open()
    tree.append(request, [1] * 200_000)
    assert drafted(tree, request, 4) == [1] * 4
    assert tree.forest.memory_bytes < 200_000 * 200


@pytest.mark.parametrize("max_match", [0, 256])
def test_max_match_is_bounded(max_match: int) -> None:
    with pytest.raises(ValueError, match="max_match"):
        SuffixForest(max_match=max_match)


def test_bad_arguments_raise_and_change_nothing() -> None:
    forest = SuffixForest()
    request = forest.open_request(forest.open_group(limits(1)))
    rows = handles(request)
    with pytest.raises(ValueError, match="negative"):
        forest.append(rows, limits(1, -1), handles(0, 2))
    with pytest.raises(ValueError, match="offsets"):
        forest.append(rows, limits(1), handles(0, 2))
    with pytest.raises(ValueError, match="decrease"):
        forest.append(handles(request, request), limits(1), handles(0, 2, 1))
    with pytest.raises(KeyError):
        forest.append(handles(request, 99), limits(1, 1), handles(0, 1, 2))
    with pytest.raises(ValueError, match="negative"):
        forest.draft(rows, limits(-1))
    with pytest.raises(ValueError, match="top_k"):
        forest.draft_tree(rows, limits(1), top_k=0)
    with pytest.raises(ValueError, match="repeat"):
        forest.close_requests(handles(request, request))
    assert forest.tokens(request).tolist() == []


def test_returned_arrays_outlive_the_forest() -> None:
    forest = SuffixForest()
    request = forest.open_request(forest.open_group(limits(1, 2, 3, 1)))
    drafts = forest.draft(handles(request), limits(2))
    del forest
    gc.collect()
    assert drafts.tokens.tolist() == [2, 3]


def test_threads_may_share_a_forest() -> None:
    forest = SuffixForest()
    group = forest.open_group(limits(1, 2, 3))

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        request = handles(forest.open_request(group))
        for _ in range(200):
            forest.append(request, rng.integers(0, 5, 3, np.int32), handles(0, 3))
            forest.draft(request, limits(4))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert forest.num_tokens == 3 + 4 * 200 * 3


def test_closing_requests_returns_the_memory_of_what_they_wrote() -> None:
    forest = SuffixForest()
    group = forest.open_group(limits(1, 2, 3))
    small, large = (forest.open_request(group) for _ in range(2))
    before = forest.memory_bytes
    tokens = np.arange(20_000, dtype=np.int32)
    forest.append(handles(large), tokens, handles(0, len(tokens)))
    forest.close_requests(handles(large))
    assert forest.memory_bytes < 2 * before
    assert forest.tokens(small).tolist() == []


def test_a_closed_requests_handle_names_no_other_request() -> None:
    forest = SuffixForest()
    group = forest.open_group(limits())
    kept, closed = (forest.open_request(group) for _ in range(2))
    forest.close_requests(handles(closed))
    again = forest.open_request(group)
    assert len({kept, closed, again}) == 3
    with pytest.raises(KeyError):
        forest.tokens(closed)
    assert forest.requests(group).tolist() == [kept, again]
