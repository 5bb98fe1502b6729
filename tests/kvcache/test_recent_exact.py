"""The book-keeping of prompts that attend in high precision: all of a prompt is held until its end, and found again
only as a whole prefix."""

from dataclasses import replace

import pytest

from kvcache.manager import KVCacheManager
from kvcache.recent import ReadRule
from tests.kvcache.test_recent import RULE, manager_of, prompt, step, store


def exact(num_prompt: int) -> ReadRule:
    return replace(RULE, num_exact=num_prompt)


def store_exact(manager: KVCacheManager, sequence: int, tokens: list[int], num_prompt: int) -> int:
    """As the engine would: no step crosses the end of the prompt. Returns how many tokens were found."""
    match = manager.match(tokens, exact(num_prompt))
    manager.open(sequence, match, len(tokens))
    for length in sorted({*range(match.num_tokens + 20, len(tokens), 20), num_prompt, len(tokens)}):
        if length > match.num_tokens:
            step(manager, sequence, tokens[:length])
    return match.num_tokens


def test_a_prompt_that_reads_everything_is_held_until_it_is_computed() -> None:
    """Bugs: a token of the prompt given away before its end, or kept beyond it."""
    manager = manager_of()
    tokens = prompt(130)
    manager.open(0, manager.match(tokens, exact(100)), 130)
    step(manager, 0, tokens[:60])
    assert set(manager.recent_table(0)) == {0, 1, 2, 3}
    step(manager, 0, tokens[:100])
    assert set(manager.recent_table(0)) == {0, 3, 4, 5, 6}  # of positions from 61 on, and the sinks


def test_prompts_that_read_everything_are_shared_up_to_their_end() -> None:
    """Bugs: such pages found by sequences that read a window, or the other way round; an answer, whose keys depend on
    where the prompt ended, taken for a longer prompt; a prompt's pages taken for an answer."""
    manager = manager_of(num_recent=60)
    tokens = prompt(200)
    assert store_exact(manager, 0, tokens[:150], 100) == 0
    assert manager.match(tokens).num_tokens == 0
    assert manager.match(tokens, exact(200)).num_tokens == 96
    assert store_exact(manager, 1, tokens, 200) == 96
    assert manager.match(tokens, exact(100)).num_tokens == 96
    assert manager.match(tokens, exact(97)).num_tokens == 96
    assert manager.match(tokens, exact(96)).num_tokens == 64
    store(manager, 2, prompt(100, which=1))
    assert manager.match(prompt(100, which=1), exact(100)).num_tokens == 0


def test_a_prompt_is_found_as_far_as_all_of_it_is_left() -> None:
    """Bug: a prefix taken up of which a query reads pages that are gone."""
    manager = manager_of(num_recent=10)
    store_exact(manager, 0, prompt(160), 160)
    manager.release(0)
    assert manager.match(prompt(170), exact(170)).num_tokens == 160
    store(manager, 1, prompt(30, which=1), chunk=16)  # takes two pages: those of the end go first
    assert manager.match(prompt(170), exact(170)).num_tokens == 128


def test_a_prompt_that_was_read_is_kept_from_its_beginning_and_no_longer_than_others() -> None:
    """Bugs: the pages of a prompt that is being answered driven out before those of one that nobody asked for since;
    its beginning driven out first, without which the rest is of no use."""
    manager = manager_of(num_recent=19)
    first, second = prompt(128), prompt(128, which=1)
    store_exact(manager, 0, first, 128)
    manager.release(0)
    store_exact(manager, 1, [*second, 1, 2, 3], 128)  # 8 pages of each, one for the answer, and two that nobody had
    left = []
    for other in range(2, 14):
        left.append([manager.match([*one, 1], exact(129)).num_tokens for one in (first, second)])
        store(manager, other, prompt(14, which=other))  # takes a page and keeps it
    firsts = [(n, 128) for n in (128, 128, 128, 96, 96, 64, 64, 32, 32, 0, 0)]
    assert [tuple(pair) for pair in left] == [*firsts, (0, 64)]


@pytest.mark.parametrize("window", [0, 16])
def test_all_of_a_prompt_is_found_whatever_the_window(window: int) -> None:
    """Bug: pages that no window reaches from a page end are not kept, though the rest of a longer prompt reads them."""
    manager = manager_of(rule=replace(RULE, window=window))
    rule = ReadRule(window, RULE.num_sinks, num_exact=96)
    manager.open(0, manager.match(prompt(96), rule), 96)
    step(manager, 0, prompt(96))
    assert manager.match(prompt(200), replace(rule, num_exact=200)).num_tokens == 96


def test_the_answer_of_a_fork_is_not_a_prompt() -> None:
    """Bug: what a second choice wrote, whose keys depend on where the prompt ended, taken for a longer prompt."""
    manager = manager_of()
    store_exact(manager, 0, prompt(70), 70)
    assert manager.fork(0, 1) is not None
    for length in range(80, 140, 10):
        step(manager, 1, prompt(length))
    manager.release(1)
    assert manager.match(prompt(140), exact(140)).num_tokens == 64


def test_the_rest_of_a_prompt_is_reserved() -> None:
    """Bug: two long prompts let in that take each other's pages until one is computed again."""
    manager = manager_of(num_recent=16)
    tokens = prompt(150)
    manager.open(0, manager.match(tokens, exact(150)), 150)
    step(manager, 0, tokens[:20])
    other = manager.match(prompt(96, which=1), exact(96))
    assert manager.has_room(other, 96, spare=0)
    assert not manager.has_room(other, 96, spare=1)
    assert not manager.has_room(manager.match(prompt(97, which=1), exact(97)), 97, spare=0)


def test_a_swapped_answer_needs_a_window_and_no_prompt() -> None:
    """Bug: a sequence that waits for room for a prompt which it has read already."""
    manager = manager_of(num_recent=12)
    store_exact(manager, 0, prompt(180), 170)
    image = manager.image(0)
    manager.release(0)
    store(manager, 1, prompt(100, which=1), chunk=16)
    assert manager.has_room(manager.surviving(image), 180, spare=0)
    assert set(image.recent_held.pages if image.recent_held else ()) == {0, 8, 9, 10, 11}
