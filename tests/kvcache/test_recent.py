"""The book-keeping of recent pages: what a sequence holds, what a hit needs, who may write, what goes first."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.manager import KVCacheManager, RecentSizes
from kvcache.recent import Occupancy, ReadRule

P = 32  # tokens of a page: two recent pages
RULE = ReadRule(window=40, num_sinks=4)


def manager_of(
    num_recent: int = 40, rule: ReadRule = RULE, num_pages: int = 40, sharing: bool = True
) -> KVCacheManager:
    return KVCacheManager(num_pages, P, "test", sharing, RecentSizes(num_recent, rule))


def store(manager: KVCacheManager, sequence: int, tokens: list[int], chunk: int = 1000) -> int:
    """Open a sequence and run it to its end; returns the length of the hit."""
    match = manager.match(tokens)
    manager.open(sequence, match, len(tokens))
    for start in range(match.num_tokens, len(tokens), chunk):
        step(manager, sequence, tokens[: start + chunk])
    return match.num_tokens


def step(manager: KVCacheManager, sequence: int, tokens: list[int]) -> None:
    """Store what is missing of `tokens`."""
    assert manager.extend(sequence, len(tokens) - manager.num_stored(sequence)) is not None
    manager.check_integrity()
    manager.commit(sequence, tokens, len(tokens))
    manager.check_integrity()


def prompt(length: int, which: int = 0) -> list[int]:
    return [1000 * which + i for i in range(length)]


@pytest.mark.parametrize("window", [0, 1, 2, 16, 17, 40])
@pytest.mark.parametrize("num_sinks", [0, 1, 16, 20])
def test_what_is_held_is_what_the_read_rule_reads(window: int, num_sinks: int) -> None:
    """Bug: a window one page too short at some length, or one that never lets go."""
    rule = ReadRule(window, num_sinks)
    for n in range(130):
        read = {j // 16 for j in range(n) if j < num_sinks or n - j < window}
        started = {n // 16} if window and n % 16 else set()  # the next row goes there
        sinks = {r for r in range(rule.num_sink_pages) if 16 * r < n}
        held = rule.before(n)
        assert set(held) == read | started | sinks
        assert len(held) == len(set(held))
        assert len(set(held) | {*rule.written(n, 1)}) <= rule.max_pages
    assert max(len({*rule.before(n), *rule.written(n, 1)}) for n in range(130)) == rule.max_pages


def test_a_chunk_takes_pages_for_the_length_of_its_step() -> None:
    """Bug: the pages of a prompt's rows that are kept until the sequence ends."""
    manager = manager_of(sharing=False)
    manager.open(0, manager.match(prompt(200)), 200)
    assert manager.extend(0, 200) is not None
    assert set(manager.recent_table(0)) == set(range(13))
    manager.commit(0, prompt(200), 200)
    assert set(manager.recent_table(0)) == {0, 10, 11, 12}  # the sinks, and positions above 160
    assert manager.num_recent_available == 36
    manager.release(0)
    assert manager.num_recent_available == 40


def test_a_hit_brings_the_window_and_the_sinks() -> None:
    """Bug: full pages without what the next token reads in high precision."""
    manager = manager_of()
    store(manager, 0, prompt(100))
    table = dict(manager.recent_table(0))
    assert store(manager, 1, [*prompt(96), 7, 8]) == 96
    found = manager.recent_table(1)
    assert {r: found[r] for r in (0, 4, 5)} == {r: table[r] for r in (0, 4, 5)}
    assert found[6] != table[6]  # started by both


def test_a_window_that_is_gone_shortens_the_hit() -> None:
    """Bug: a hit on a window that was handed to someone else."""
    manager = manager_of(num_recent=10)
    store(manager, 0, prompt(97), chunk=20)
    manager.release(0)
    assert manager.match(prompt(97)).num_tokens == 96
    store(manager, 1, prompt(60, which=1))
    manager.release(1)
    assert manager.match(prompt(97)).num_tokens == 96  # the window of its end was kept
    store(manager, 1, prompt(120, which=2), chunk=16)
    store(manager, 2, prompt(60, which=3), chunk=16)
    match = manager.match(prompt(97))
    assert match.num_tokens < 96
    assert manager.num_cached >= 3  # its full pages are still there
    assert match.recent.num_wanted == 96
    manager.open(3, match, 97)
    assert manager.num_cut_tokens == 96 - match.num_tokens


def test_ends_outlive_what_was_only_passed() -> None:
    """Bug: one long prompt that drives out the windows of all other prefixes."""
    manager = manager_of(num_recent=16)
    store(manager, 0, prompt(70))
    manager.release(0)
    store(manager, 1, prompt(600, which=1), chunk=100)
    manager.release(1)
    assert manager.match(prompt(70)).num_tokens == 64
    assert manager.match(prompt(600, which=1)).num_tokens == 576


def test_a_prefix_that_was_looked_up_in_vain_is_kept_next_time() -> None:
    """Bug: a prompt's common beginning, always passed and never an end, that no request ever finds."""
    manager = manager_of(num_recent=30)
    common = prompt(96)
    for which, hit in enumerate([0, 0, 96, 96]):
        store(manager, which, [*common, *prompt(300, which + 1)], chunk=64)
        assert manager.num_hit_tokens == hit * max(0, which - 1), f"prompt {which}"
        manager.release(which)
        store(manager, 100 + which, prompt(200, which + 10), chunk=64)
        manager.release(100 + which)


def test_the_oldest_end_goes_first() -> None:
    manager = manager_of(num_recent=12)
    for which in range(2):
        store(manager, which, prompt(70, which), chunk=32)
        manager.release(which)
    store(manager, 2, prompt(70, 0), chunk=32)  # uses the first again
    manager.release(2)
    store(manager, 3, prompt(70, 3), chunk=16)
    assert manager.match(prompt(70, 0)).num_tokens == 64
    assert manager.match(prompt(70, 1)).num_tokens < 64


def test_what_continues_a_sequence_is_as_recent_as_its_end() -> None:
    """Bug: half of a window, given away because it fell out of the sequence's own a while before the sequence ended."""
    manager = manager_of(num_recent=11)
    store(manager, 0, prompt(64))
    for length in range(65, 95):
        step(manager, 0, prompt(length))
    store(manager, 1, prompt(70, which=1))
    manager.release(1)
    manager.release(0)
    store(manager, 2, prompt(70, which=2), chunk=16)
    assert manager.match(prompt(94)).num_tokens == 64
    assert manager.match(prompt(70, which=1)).num_tokens < 64


def test_a_fork_copies_the_started_page_alone() -> None:
    """Bug: two choices that write their next tokens into one recent page."""
    manager = manager_of()
    store(manager, 0, prompt(70))
    copies = manager.fork(0, 1)
    assert copies is not None
    manager.check_integrity()
    mine, theirs = manager.recent_table(0), manager.recent_table(1)
    assert {r for r in mine if mine[r] != theirs[r]} == {4}
    assert [(c.source, c.target) for c in copies if c.is_recent] == [(mine[4], theirs[4])]
    step(manager, 0, prompt(90))
    step(manager, 1, [*prompt(70), *prompt(20, which=1)])


def test_a_fork_without_a_recent_page_changes_nothing() -> None:
    manager = manager_of(num_recent=6)
    store(manager, 0, prompt(70), chunk=1)
    store(manager, 1, [5], chunk=1)
    assert manager.num_recent_available == 0
    assert manager.fork(0, 2) is None
    manager.check_integrity()
    manager.release(1)
    manager.check_integrity()
    assert manager.fork(0, 2) is not None


def test_extend_refuses_without_changing_anything() -> None:
    """Bug: pages taken for a step that has no recent pages, lost when it is tried again."""
    manager = manager_of(num_recent=6)
    store(manager, 0, prompt(64))
    before = manager.num_available
    assert manager.extend(0, 64) is None
    assert manager.num_available == before
    manager.check_integrity()
    assert manager.fitting(0, 64) == 32  # positions above 24 and the sinks are held, on four pages
    assert manager.extend(0, 32) is not None


def test_one_sequence_always_gets_on() -> None:
    """Bug: a pool as small as allowed in which a chunk waits for pages that nobody will give back."""
    manager = manager_of(num_recent=RULE.max_pages)
    tokens = prompt(300)
    manager.open(0, manager.match(tokens), 300)
    while (done := manager.num_stored(0)) < 300:
        num_tokens = manager.fitting(0, min(100, 300 - done))
        assert num_tokens >= 1
        step(manager, 0, tokens[: done + num_tokens])


def test_a_matched_window_is_not_counted_as_room() -> None:
    """Bug: idle pages of the hit itself promised to it a second time."""
    manager = manager_of(num_recent=6)
    store(manager, 0, prompt(97), chunk=16)
    manager.release(0)
    match = manager.match(prompt(130))
    assert match.num_tokens == 96
    assert manager.has_room(match, 130, 6 - RULE.max_pages)
    assert not manager.has_room(match, 130, 7 - RULE.max_pages)


def test_a_sequence_holds_the_window_that_it_asked_for() -> None:
    """Bugs: a long window that is cut to the cache's own, that is not counted as taken, or that others find."""
    manager = manager_of(num_recent=10)
    tokens = prompt(97)
    longer = replace(RULE, window=80)
    match = manager.match(tokens, longer)
    assert not manager.has_room(match, 97, spare=4)  # positions above 17, the sinks and the row itself: 7 pages
    assert manager.has_room(match, 97, spare=3)
    manager.open(0, match, 97)
    for length in (*range(20, 97, 20), 97):
        step(manager, 0, tokens[:length])
    assert set(manager.recent_table(0)) == {0, 1, 2, 3, 4, 5, 6}
    manager.release(0)
    assert manager.match(tokens, longer).num_tokens == 96
    assert manager.match(tokens).num_tokens == manager.match(tokens, replace(RULE, window=81)).num_tokens == 0


def test_tokens_are_counted_once() -> None:
    """Bug: shared tokens counted for each of their holders, or rows that are reserved and not written."""
    manager = manager_of()
    store(manager, 0, prompt(70))
    store(manager, 1, [*prompt(64), 7, 8, 9])
    assert manager.num_tokens_held == 70 + 3
    # Of the window from 31 on and the sinks, 64 are shared, and each has started a page.
    assert manager.recent_occupancy == Occupancy(40, 6, 0, 64 + 6 + 3)
    manager.extend(0, 40)
    assert manager.num_tokens_held == 70 + 3
    assert manager.recent_occupancy.num_tokens == 64 + 6 + 3
    manager.release(0)
    manager.release(1)
    assert manager.num_tokens_held == manager.recent_occupancy.num_tokens == 0
    assert manager.recent_occupancy.num_cached > 0


@pytest.mark.parametrize("damage", ["lose", "leak", "share"])
def test_check_integrity_sees_recent_pages(damage: str) -> None:
    """The check itself must be able to fail."""
    manager = manager_of()
    store(manager, 0, prompt(100))
    store(manager, 1, prompt(100, which=1))
    table = manager.recent_table(0)
    assert manager._recent is not None
    if damage == "lose":
        manager._recent._tier.drop(table.pop(4))
    elif damage == "leak":
        table[1] = manager._recent._tier.take()
    else:
        manager._recent._tier.hold(table[6])
        manager._recent._tier.drop(manager.recent_table(1)[6])
        manager.recent_table(1)[6] = table[6]
    with pytest.raises(RuntimeError, match={"lose": "lacks", "leak": "will not read", "share": "may write"}[damage]):
        manager.check_integrity()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_history_keeps_the_invariants(data: st.DataObject) -> None:
    """Random opens, chunks, forks and releases: pages of both kinds are accounted for, and none has two writers."""
    rule = ReadRule(data.draw(st.sampled_from([0, 1, 16, 40])), data.draw(st.sampled_from([0, 4, 20])))
    longer = data.draw(st.sampled_from([64, 90]))  # what some sequences ask for
    wishes = [None, replace(rule, window=longer), *(replace(rule, num_exact=n) for n in (17, 32, 70))]
    num_recent = max((wish or rule).max_pages for wish in wishes) + data.draw(st.integers(0, 12))
    manager = manager_of(num_recent, rule, data.draw(st.integers(3, 12)), data.draw(st.booleans()))
    tokens: dict[int, list[int]] = {}
    num_exact: dict[int, int] = {}
    for new_id in range(data.draw(st.integers(1, 25))):
        verb = data.draw(st.sampled_from(["open", "chunk", "chunk", "fork", "release"]))
        chosen = data.draw(st.sampled_from(sorted(tokens))) if tokens else None
        if verb == "open":
            wanted = prompt(data.draw(st.integers(1, 90)), data.draw(st.integers(0, 1)))
            match = manager.match(wanted, wish := data.draw(st.sampled_from(wishes)))
            if manager.has_room(match, len(wanted), 0):
                num_exact[new_id] = 0 if wish is None else wish.num_exact
                manager.open(new_id, match, len(wanted))
                tokens[new_id] = wanted[: match.num_tokens]
        elif chosen is not None and verb == "chunk":
            left = num_exact[chosen] - len(tokens[chosen])  # of the prompt, which no step crosses
            drawn = data.draw(st.integers(1, 40))
            more = manager.fitting(chosen, min(drawn, left) if left > 0 else drawn)
            if manager.extend(chosen, more) is not None:
                tokens[chosen] += prompt(len(tokens[chosen]) + more, data.draw(st.integers(0, 1)))[-more:]
                manager.check_integrity()
                manager.commit(chosen, tokens[chosen], len(tokens[chosen]))
        elif chosen is not None and verb == "fork":
            if manager.fork(chosen, new_id) is not None:
                tokens[new_id], num_exact[new_id] = list(tokens[chosen]), num_exact[chosen]
        elif chosen is not None:
            manager.release(chosen)
            del tokens[chosen]
        manager.check_integrity()
    for sequence in tokens:
        manager.release(sequence)
    manager.check_integrity()
    assert manager.num_used == 0
    assert manager.num_recent_available == num_recent
