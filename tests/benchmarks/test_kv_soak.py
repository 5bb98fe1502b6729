"""A moment of the soak: memory is full, and nothing is lost or wrong."""

from pathlib import Path

import pytest

from benchmarks.kv_soak import soak


@pytest.mark.parametrize(("policy", "swap_sequences"), [("k4v4:w32", 2), ("f16", 1), ("skvq:k2v2:w32", 0)])
def test_a_full_cache_answers_like_an_empty_one(tmp_path: Path, policy: str, swap_sequences: float) -> None:
    """Bug: any page, window or swapped byte that is lost or mistaken when there is no room."""
    counts = soak(policy, swap_sequences, 50, tmp_path)
    assert counts["preemptions"] > 0
    assert (counts["swaps_out"] > 0) == (swap_sequences > 0)
