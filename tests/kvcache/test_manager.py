"""The page book-keeping: ids and counts, no tensors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.manager import KVCacheManager

P = 4  # tokens on a page


def manager_of(num_pages: int, sharing: bool = True) -> KVCacheManager:
    return KVCacheManager(num_pages, P, salt="test", sharing=sharing)


def store(manager: KVCacheManager, sequence: int, tokens: list[int]) -> list[int]:
    """Open, extend and commit a whole prompt; returns the block table."""
    match = manager.match(tokens)
    manager.open(sequence, match, len(tokens))
    table = manager.extend(sequence, len(tokens) - match.num_tokens)
    assert table is not None
    manager.commit(sequence, tokens, len(tokens))
    manager.check_integrity()
    return list(table)


def test_second_prompt_shares_full_pages_and_computes_the_rest() -> None:
    """Bug: a hit that takes the partial page too would let two sequences write one page."""
    manager = manager_of(8)
    first = store(manager, 0, list(range(10)))  # two full pages and a started one
    second = store(manager, 1, [*range(8), 99, 98])
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert manager.num_hit_tokens == 8


def test_a_hit_leaves_the_last_token_to_compute() -> None:
    """Bug: a prompt that is cached to its very end has no row to take logits from."""
    manager = manager_of(8)
    store(manager, 0, list(range(8)))
    assert manager.match(list(range(8))).num_tokens == 4


def test_same_tokens_after_another_prefix_do_not_match() -> None:
    """Bug: hashing a page alone, without what stands before it, serves keys computed in another context."""
    manager = manager_of(8)
    store(manager, 0, [1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert manager.match([9, 9, 9, 9, 2, 2, 2, 2, 3]).num_tokens == 0


def test_another_salt_never_matches() -> None:
    """Bug: pages of another model or cache policy taken for ours."""
    keys = []
    for salt in ("model a", "model b"):
        manager = KVCacheManager(4, P, salt)
        store(manager, 0, [1, 2, 3, 4, 5])
        keys.append(manager.match([1, 2, 3, 4, 5]).keys)
    assert keys[0] != keys[1]


def test_released_pages_stay_findable_until_evicted_oldest_tail_first() -> None:
    """Bug: evicting the head of a prefix first makes every page behind it unreachable."""
    manager = manager_of(4)
    tokens = list(range(12))
    store(manager, 0, [*tokens, 100])  # three full pages and one more
    manager.release(0)
    assert (manager.num_used, manager.num_cached, manager.num_available) == (0, 3, 4)
    store(manager, 1, [50, 51, 52, 53, 54])  # takes the free page, then evicts the least useful one
    assert manager.match([*tokens, 100]).num_tokens == 8


def test_extend_refuses_without_changing_anything() -> None:
    """Bug: a failed allocation that keeps what it got leaks pages until the engine stalls."""
    manager = manager_of(2)
    store(manager, 0, [1, 2, 3])
    before = manager.num_available
    assert manager.extend(0, 2 * P) is None
    assert manager.num_available == before
    manager.check_integrity()


def test_pages_in_use_are_never_evicted() -> None:
    """Bug: a page shared by a running sequence handed to another one corrupts both."""
    manager = manager_of(3)
    held = store(manager, 0, list(range(8)))
    assert manager.num_available == 1
    manager.open(1, manager.match([7, 7, 7, 7, 7, 7]), 6)
    assert manager.extend(1, 6) is None
    assert manager.num_stored(0) == 8
    manager.release(1)
    manager.release(0)
    assert manager.num_available == 3
    assert set(held) <= set(range(3))


def test_missing_counts_idle_pages_a_match_would_take() -> None:
    """Bug: counting a matched idle page as still available admits a prompt that does not fit."""
    manager = manager_of(3)
    store(manager, 0, list(range(9)))
    manager.release(0)
    match = manager.match([*range(8), 50, 51, 52, 53, 54])
    assert match.num_tokens == 8
    assert manager.missing(match, 13) == 4  # two new pages and two idle ones
    assert manager.num_available == 3


def test_fork_shares_full_pages_and_copies_the_started_one() -> None:
    """Bug: two choices that write the same started page overwrite each other's tokens."""
    manager = manager_of(8)
    parent = store(manager, 0, list(range(6)))
    copies = manager.fork(0, 1)
    assert copies is not None
    child = manager.extend(1, 1)
    assert child is not None
    assert child[0] == parent[0]
    assert [(copy.source, copy.target) for copy in copies] == [(parent[1], child[1])]
    manager.check_integrity()
    manager.release(0)
    manager.check_integrity()
    manager.release(1)
    assert manager.num_used == 0


def test_fork_without_room_changes_nothing() -> None:
    """Bug: half a fork left behind when the copy finds no page."""
    manager = manager_of(2)
    store(manager, 0, list(range(6)))
    assert manager.fork(0, 1) is None
    manager.check_integrity()
    manager.release(0)
    assert manager.num_available == 2


def test_fork_at_a_page_border_needs_no_copy() -> None:
    manager = manager_of(2)
    store(manager, 0, list(range(8)))
    assert manager.fork(0, 1) == []
    manager.check_integrity()


def test_sharing_off_matches_nothing_and_keeps_nothing() -> None:
    manager = manager_of(4, sharing=False)
    store(manager, 0, list(range(9)))
    manager.release(0)
    assert manager.match(list(range(9))).num_tokens == 0
    assert (manager.num_cached, manager.num_available) == (0, 4)


def test_check_integrity_sees_a_lost_page() -> None:
    """The check itself must be able to fail."""
    manager = manager_of(4)
    store(manager, 0, [1, 2, 3, 4, 5])
    manager._tier.take()
    with pytest.raises(RuntimeError, match="page"):
        manager.check_integrity()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_history_keeps_the_invariants(data: st.DataObject) -> None:
    """Random opens, decodes, forks and releases: every page is free, idle or held, and counts match holders."""
    manager = manager_of(data.draw(st.integers(2, 10)))
    tokens: dict[int, list[int]] = {}
    for new_id in range(data.draw(st.integers(1, 30))):
        verb = data.draw(st.sampled_from(["open", "decode", "fork", "release"]))
        chosen = data.draw(st.sampled_from(sorted(tokens))) if tokens else None
        if verb == "open":
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=14))
            match = manager.match(prompt)
            if manager.missing(match, len(prompt)) <= manager.num_available:
                manager.open(new_id, match, len(prompt))
                assert manager.extend(new_id, len(prompt) - match.num_tokens) is not None
                manager.commit(new_id, prompt, len(prompt))
                tokens[new_id] = prompt
        elif chosen is not None and verb == "decode":
            if manager.extend(chosen, 1) is not None:
                tokens[chosen].append(data.draw(st.integers(0, 1)))
                manager.commit(chosen, tokens[chosen], len(tokens[chosen]))
        elif chosen is not None and verb == "fork":
            if manager.fork(chosen, new_id) is not None:
                tokens[new_id] = list(tokens[chosen])
        elif chosen is not None:
            manager.release(chosen)
            del tokens[chosen]
        manager.check_integrity()
    for sequence in tokens:
        manager.release(sequence)
    manager.check_integrity()
    assert manager.num_used == 0
