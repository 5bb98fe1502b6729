"""What a preempted sequence needs of its pages, by ids and counts; bytes are in tests/engine/test_schedules.py."""

import pytest

from kvcache.manager import KVCacheManager, RecentSizes
from kvcache.recent import ReadRule
from kvcache.tier import PageTier

P = 16  # tokens on a page
RULE = ReadRule(window=40, num_sinks=4)


def store(manager: KVCacheManager, sequence: int, tokens: list[int]) -> None:
    manager.open(sequence, manager.match(tokens), 0)
    assert manager.extend(sequence, len(tokens) - manager.num_stored(sequence)) is not None
    manager.commit(sequence, tokens, len(tokens))


def test_pages_found_are_held_before_others_are_taken() -> None:
    """Bug: room made for the first page by evicting the second, which was about to be taken up."""
    tier = PageTier("page", 2)
    old, new = tier.take(), tier.take()
    for key, page in ((b"old", old), (b"new", new)):
        tier.index.insert(key, page)
        tier.drop(page)
    assert tier.restore([None, b"old"]) == ([new, old], [0])
    tier.check([[new, old]])


@pytest.mark.parametrize("recent", [None, RecentSizes(20, RULE)])
def test_only_what_the_index_lost_is_copied_back(recent: RecentSizes | None) -> None:
    """Bug: pages copied over those that others read, or a copy left out."""
    manager = KVCacheManager(6, P, "test", recent=recent)
    tokens = list(range(75))
    store(manager, 0, tokens)
    image = manager.image(0)
    assert (len(image.pages), len(image.recent_pages)) == (5, 4 if recent else 0)
    manager.release(0)
    store(manager, 1, [99] * 33)  # takes the free page, the started one, and the last full one
    manager.release(1)
    assert manager.has_room(manager.surviving(image), 76, 1)
    assert not manager.has_room(manager.surviving(image), 76, 2)
    copies = manager.reopen(0, image)
    assert [copy.source for copy in copies if not copy.is_recent] == [3, 4]
    table = manager.extend(0, 1)
    assert table is not None
    assert [table[copy.source] for copy in copies if not copy.is_recent] == [
        c.target for c in copies if not c.is_recent
    ]
    manager.commit(0, [*tokens, 7], 76)
    manager.check_integrity()
    manager.release(0)
    assert manager.match([*tokens, 7, 7, 7, 7, 7]).num_tokens == 64  # what came back can be found again


def test_pages_of_the_step_that_is_lost_are_no_part() -> None:
    """Bug: unwritten pages copied, and taken for tokens that are stored."""
    manager = KVCacheManager(8, P, "test", recent=RecentSizes(20, RULE))
    store(manager, 0, list(range(20)))
    assert manager.extend(0, 60) is not None
    image = manager.image(0)
    assert (len(image.pages), len(image.recent_pages)) == (2, 2)
    manager.release(0)
    manager.reopen(0, image)
    assert manager.num_stored(0) == 20
    manager.check_integrity()
