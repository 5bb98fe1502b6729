"""The arithmetic of the kernel benchmark: which limit binds, and that weights are cold."""

import pytest

from benchmarks.kernels import Case, Limits, judged, median_seconds, num_copies


@pytest.mark.parametrize(
    ("num_bytes", "operations", "peak", "share", "limit"),
    [
        (30e9, 1e9, "dot", 0.5, "read"),  # reading takes 0.5 s, multiplying 0.01 s
        (1e9, 80e9, "dot", 0.8, "dot"),
        (1e9, 10e9, "fma", 0.4, "fma"),
    ],
)
def test_the_share_is_that_of_the_limit_which_binds(
    num_bytes: float, operations: float, peak: str, share: float, limit: str
) -> None:
    result = judged(Case("x", 1, num_bytes, operations, peak, []), 1.0, Limits(read=60, dot=100, fma=25))
    assert result.limit == limit
    assert [result.share, result.gb_per_s, result.gop_per_s] == pytest.approx(
        [share, num_bytes / 1e9, operations / 1e9]
    )


def test_calls_take_turns_on_all_copies() -> None:
    """Bug: one copy is measured again and again, out of the cache."""
    counts = [0, 0, 0]

    def call(index: int) -> None:
        counts[index] += 1

    median_seconds([lambda: call(0), lambda: call(1), lambda: call(2)])
    assert max(counts) - min(counts) <= 1


def test_small_weights_have_many_copies() -> None:
    assert num_copies(1e6) > num_copies(10e6) >= 2
    assert num_copies(1e12) == 2
