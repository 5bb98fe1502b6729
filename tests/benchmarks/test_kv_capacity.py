"""Capacity: what quantized pages, their windows and all that a plan keeps beside them let in."""

import pytest

from benchmarks.kv_capacity import compare


@pytest.mark.parametrize(
    ("model", "policy", "context", "least"),
    [
        ("llama-3-8b", "k4v4", 8192, 3.4),
        ("llama-3-8b", "skvq:k2v2", 8192, 6.0),
        ("llama-3-8b", "skvq:k2v2", 4096, 5.4),
        ("llama-3.2-1b", "skvq:k2v2", 4096, 4.9),
    ],
)
def test_tokens_admitted_against_float16(model: str, policy: str, context: int, least: float) -> None:
    """Bug: windows, the rows of a step or spare pages that take what quantizing saved."""
    rows = {row["plan"]: row["ratio"] for row in compare(model, context, (policy,))}
    assert rows["seats"] >= least  # type: ignore[operator]
