"""The arithmetic of the benchmark of quantized caches, and that what it measures can be measured."""

import pytest

from benchmarks.kv_speed import CHUNK, NUM_RECENT, Case, Work, judged, num_copies, trial_seconds
from benchmarks.shapes import SMALLEST

WORK = Work(SMALLEST, 2 * CHUNK + 3, 1)


def test_ratios_are_those_of_one_trial() -> None:
    """Bug: a slow trial of one policy divided by a fast one of another."""
    cases = [Case("f16", 8000, []), Case("k4v4", 2000, [])]
    trials = [(4e-6, 2e-6), (8e-6, 2e-6), (8e-6, 4e-6)]
    base, found = judged(cases, trials, "small", WORK, read=2.0)
    assert (base.against_f16, base.lowest, base.highest) == (1, 1, 1)
    assert (found.against_f16, found.lowest, found.highest) == (2, 2, 4)
    assert (found.microseconds, found.share) == pytest.approx((2, 0.5))


def test_policies_take_turns_on_all_copies() -> None:
    """Bug: one copy is measured again and again, out of the cache."""
    order: list[int] = []
    cases = [Case("a", 1, [lambda: order.append(0), lambda: order.append(1)]), Case("b", 1, [lambda: order.append(2)])]
    assert len(trial_seconds(cases)) == 2
    assert order[:6] == [0, 2, 1, 2, 0, 2]
    assert num_copies(1 << 20) > num_copies(40 << 20) == 2


def test_steps_hold_the_recent_pages_that_they_read() -> None:
    """Bug: a window whose pages a later chunk took, or sinks that were overwritten."""
    inputs = WORK.inputs(CHUNK, 2 * CHUNK)
    assert inputs.recent is not None
    ids = [i for i in inputs.recent.tables[0].tolist() if i >= 0]
    assert len(ids) == len(set(ids)) <= 1 + NUM_RECENT
    assert inputs.recent.tables[0, 0] == 0
    assert WORK.last().context_lens == (2 * CHUNK + 3,)
