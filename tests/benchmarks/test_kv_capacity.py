"""Capacity: what quantized pages, their windows and all that a plan keeps beside them let in."""

import pytest

from benchmarks.kv_capacity import NUM_F16, compare
from benchmarks.shapes import SHAPES

PAGE, RECENT, WINDOW, SINKS, STEP = 64, 16, 128, 4, 512  # tokens


def sequences_within(model: str, bits: int, context: int, leaves_spare: bool) -> int:
    """As many as fit into the memory of NUM_F16 sequences in float16, by arithmetic alone: packed pages, the recent
    pages of a window and the sinks each, and those of one step's rows. leaves_spare: one page for each but the last,
    which admission keeps for what the others write next.

    bits: of a key and a value channel together. Parameters are two bytes for each group of half a head.
    """
    shape = SHAPES[model]
    heads, dim = shape.num_layers * shape.num_kv_heads, shape.head_dim
    page = heads * PAGE * (dim * bits // 8 + 2 * 2 * 2)  # whole cache lines as they are
    recent = heads * RECENT * 2 * 2 * dim
    per_sequence = -(-(WINDOW - 1) // RECENT) + 1 + -(-SINKS // RECENT)
    budget = NUM_F16 * context * heads * 2 * 2 * dim
    num = 0
    while True:
        num_pages = (num + 1) * context // PAGE + (num if leaves_spare else 0)
        if num_pages * page + ((num + 1) * per_sequence + STEP // RECENT) * recent > budget:
            return num
        num += 1


@pytest.mark.parametrize(
    ("model", "policy", "bits", "context"),
    [
        ("llama-3-8b", "k4v4", 8, 8192),
        ("llama-3-8b", "skvq:k2v2", 4, 8192),
        ("llama-3-8b", "skvq:k2v2", 4, 4096),
        ("llama-3.2-1b", "skvq:k2v2", 4, 4096),
    ],
)
def test_as_many_sequences_run_as_their_bytes_allow(model: str, policy: str, bits: int, context: int) -> None:
    """Bug: windows, the rows of a step or spare pages that take what quantizing saved; or that nobody provides for."""
    rows = {str(row["plan"]): row["tokens"] for row in compare(model, context, (policy,))}
    least, most = (sequences_within(model, bits, context, leaves_spare) for leaves_spare in (True, False))
    assert least * context <= int(str(rows["seats"])) <= most * context
