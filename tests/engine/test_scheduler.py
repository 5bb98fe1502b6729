"""Who runs in a step: driven with ids and counts alone, each step committed as the core would."""

import pytest

from engine.messages import Sampling, Submit
from engine.request import Request, Sequence
from engine.scheduler import Scheduler, Slice
from kvcache.manager import KVCacheManager

P = 4  # tokens on a page


class World:
    """A scheduler whose model always generates token 7."""

    def __init__(self, num_pages: int = 64, max_num_seqs: int = 8, max_batch_tokens: int = 16) -> None:
        self.manager = KVCacheManager(num_pages, P, salt="test")
        self.scheduler = Scheduler(self.manager, max_num_seqs, max_batch_tokens)
        self.num_added = 0

    def add(self, prompt: list[int], max_tokens: int = 100, priority: int = 0) -> Sequence:
        submit = Submit(str(self.num_added), prompt, Sampling(max_tokens), arrival=0.0, priority=priority)
        sequence = Sequence(self.num_added, Request(submit, self.num_added, seed=0), 0, list(prompt))
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> dict[int, int]:
        """Run one step; returns sequence id -> tokens computed."""
        slices = self.scheduler.schedule()
        for item in slices:
            self._store(item)
        self.manager.check_integrity()
        return {item.sequence.id: item.num_tokens for item in slices}

    def _store(self, item: Slice) -> None:
        sequence = item.sequence
        sequence.num_computed = item.start + item.num_tokens
        self.manager.commit(sequence.id, sequence.tokens, sequence.num_computed)
        if item.completes:
            sequence.tokens.append(7)
            if sequence.num_generated >= sequence.request.submit.sampling.max_tokens:
                self.scheduler.remove(sequence)


def test_long_prompt_is_chunked_and_decodes_run_beside_it() -> None:
    """Bug: a prompt of many chunks that keeps running sequences waiting (decode starves)."""
    world = World(max_batch_tokens=8)
    world.add([1, 2, 3])
    assert world.step() == {0: 3}
    world.add(list(range(20)))
    assert [world.step() for _ in range(4)] == [{0: 1, 1: 7}, {0: 1, 1: 7}, {0: 1, 1: 6}, {0: 1, 1: 1}]


def test_budget_is_never_exceeded() -> None:
    world = World(max_batch_tokens=8)
    for _ in range(5):
        world.add(list(range(6)), max_tokens=5)
    while world.scheduler.has_work:
        assert sum(world.step().values()) <= 8


def test_seats_are_never_exceeded() -> None:
    world = World(max_num_seqs=2)
    for i in range(5):
        world.add([i, i, i], max_tokens=4)
    while world.scheduler.has_work:
        assert len(world.step()) <= 2


def test_first_come_first_served_unless_priority_says_otherwise() -> None:
    world = World(max_num_seqs=1)
    world.add([1], max_tokens=1)
    world.add([2], max_tokens=1)
    world.add([3], max_tokens=1, priority=-1)
    assert [list(world.step()) for _ in range(3)] == [[2], [0], [1]]


def test_full_cache_preempts_the_newest_and_loses_no_tokens() -> None:
    """Bug: a preempted sequence that forgets what it generated, or two that preempt each other for ever."""
    world = World(num_pages=6)
    old, new = world.add([1] * 6, max_tokens=14), world.add([2] * 6, max_tokens=14)
    num_steps = 0
    while world.scheduler.has_work:
        world.step()
        num_steps += 1
        assert num_steps < 200
    assert (old.num_preemptions, old.tokens) == (0, [1] * 6 + [7] * 14)
    assert new.num_preemptions >= 1
    assert new.tokens == [2] * 6 + [7] * 14
    assert world.manager.num_used == 0


def test_preempted_sequence_finds_its_own_pages_again() -> None:
    """Bug: recompute that ignores the pages it published itself pays the whole prompt again."""
    world = World(num_pages=8)
    sequence = world.add(list(range(12)))
    world.step()
    world.scheduler._preempt(sequence)
    assert sequence.num_computed == 0
    assert world.step() == {0: 1}  # 12 of 13 tokens were on published pages
    assert sequence.num_cached_tokens == 0  # the caller's prompt was not cached when it came


def test_better_rank_takes_pages_from_one_already_chosen_this_step() -> None:
    """Bug: a slice kept for a sequence that lost its pages a moment later writes into pages of another."""
    world = World(num_pages=5, max_batch_tokens=2, max_num_seqs=2)
    late = world.add([5] * 3, max_tokens=15, priority=1)
    world.step()
    world.step()  # the late one decodes from now on
    early = world.add([6] * 11, max_tokens=2)
    chosen = [world.step() for _ in range(30)]
    lost = next(i for i, step in enumerate(chosen) if step and late.id not in step)
    assert chosen[lost] == {early.id: 1}
    assert late.num_preemptions == 1
    assert early.tokens[11:] == [7, 7]
    assert late.tokens[3:] == [7] * 15


def test_waiting_request_takes_no_pages_from_running_ones() -> None:
    world = World(num_pages=4)
    running = world.add([1] * 8)
    world.step()
    world.add([2] * 12, priority=0)
    world.step()
    assert running.num_preemptions == 0
    assert world.scheduler.num_waiting == 1


def test_removed_sequence_frees_its_pages_at_once() -> None:
    world = World()
    running, waiting = world.add([1] * 9), world.add([2] * 40)
    world.step()
    world.scheduler.remove(running)
    world.scheduler.remove(waiting)
    assert world.manager.num_used == 0
    assert not world.scheduler.has_work


@pytest.mark.parametrize("num_pages", [7, 9, 16])
def test_mixed_load_ends_with_every_sequence_complete(num_pages: int) -> None:
    """Bug: any stall, lost token or leaked page under memory pressure, shared prefixes and priorities."""
    world = World(num_pages=num_pages, max_num_seqs=4, max_batch_tokens=8)
    added = [world.add([1] * (i % 9 + 1), max_tokens=i % 7 + 1, priority=i % 3) for i in range(25)]
    for _ in range(2000):
        if not world.scheduler.has_work:
            break
        assert world.step()
    for sequence in added:
        assert sequence.num_generated == sequence.request.submit.sampling.max_tokens
    assert world.manager.num_used == 0
