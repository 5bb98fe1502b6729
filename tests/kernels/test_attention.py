"""Every back end of every cache codec: paging apart from precision, then precision against float64."""

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from kernels.attention.f16.layout import CACHE_DTYPES, keys_of, page_shape, values_of
from kernels.attention.registry import kernels_for
from kernels.contract import AttentionInputs, AttentionKernel, AttentionSpec
from tests.kernels.attention_oracle import exact_attention, random_tokens
from tests.tolerance import EPS, assert_within

PAGE_SIZE = 16
HEADS = [(1, 1, 8), (4, 2, 16), (6, 1, 10), (3, 3, 24), (7, 1, 64)]  # num_heads, num_kv_heads, head_dim


def named(kernel: AttentionKernel) -> str:
    return kernel.name


ON_CPU = [kernel for kernel in kernels_for("f16") if "triton" not in kernel.name]  # which test_gpu_attention.py tests
every_kernel = pytest.mark.parametrize("kernel", ON_CPU, ids=named)


def nan_pages(num_pages: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Pages nobody has written: whatever reads them shows it."""
    return torch.full((num_pages, *page_shape(num_kv_heads, PAGE_SIZE, head_dim)), torch.nan, dtype=dtype)


def inputs_of(*rows: tuple[int, int, list[int]]) -> AttentionInputs:
    """(start, number of rows, block table) of each sequence."""
    return build_batch(
        [BatchRow([0] * num_rows, start, table, PAGE_SIZE, 0) for start, num_rows, table in rows]
    ).attention


@every_kernel
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("chunks", [[41], [3, 38], [16, 16, 9], [1] * 41, [17, 1, 1, 22]])
def test_paging(kernel: AttentionKernel, dtype: torch.dtype, chunks: list[int]) -> None:
    """Bug: a token stored in, or read from, another slot.

    A zero query weighs every visible token alike, and token t carries the value 64 + t: the result at position p must
    be 64 + p / 2, whatever the order of the pages, through every page edge, beside a sequence of ones.
    """
    pages = nan_pages(9, 2, 8, dtype)
    mine, ones = [7, 0, 5], [2, 8, 4]
    start = 0
    for i, num_rows in enumerate(chunks):
        inputs = inputs_of((i, 1, ones), (start, num_rows, mine))
        positions = torch.arange(start, start + num_rows)
        values = torch.cat((torch.ones(1), 64.0 + positions))[:, None, None].expand(-1, 2, 8)
        kernel.store(values, values, pages, inputs)
        result = kernel.attend(torch.zeros(1 + num_rows, 4, 8), pages, inputs, 1.0)
        expected = torch.cat((torch.ones(1), 64.0 + positions / 2))[:, None, None].expand(-1, 4, 8)
        assert_within(result, expected, 41 * EPS * expected, "mean of the visible values")
        start += num_rows


@every_kernel
def test_store_writes_its_slots_and_nothing_else(kernel: AttentionKernel) -> None:
    """Bug: a page another sequence shares is touched."""
    pages = nan_pages(4, 2, 8, torch.float32)
    k, v = random_tokens(3, 2, 8, 1), random_tokens(3, 2, 8, 2)
    kernel.store(k, v, pages, inputs_of((15, 3, [2, 1])))
    keys, values = keys_of(pages), values_of(pages)
    assert torch.equal(keys[2, :, :, 15], k[0])
    assert torch.equal(keys[1, :, :, :2], k[1:].permute(1, 2, 0))
    assert torch.equal(values[2, :, 15], v[0])
    assert torch.equal(values[1, :, :2], v[1:].transpose(0, 1))
    assert int(pages.isnan().logical_not().sum()) == 2 * k.numel()


@every_kernel
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("context_len", "num_rows"), [(1, 1), (16, 16), (53, 53), (53, 1), (53, 6), (33, 5)])
def test_precision(
    kernel: AttentionKernel, heads: tuple[int, int, int], dtype: torch.dtype, context_len: int, num_rows: int
) -> None:
    """Against float64 over the values as stored; the rest of the pages is NaN."""
    num_heads, num_kv_heads, head_dim = heads
    spec = AttentionSpec(num_heads, num_kv_heads, head_dim, PAGE_SIZE, torch.device("cpu"), torch.float32, dtype)
    reason = kernel.refuses(spec)
    if reason is not None:
        pytest.skip(reason)
    pages = nan_pages(8, num_kv_heads, head_dim, dtype)
    k, v = random_tokens(context_len, num_kv_heads, head_dim, 3), random_tokens(context_len, num_kv_heads, head_dim, 4)
    q = random_tokens(num_rows, num_heads, head_dim, 5)
    table = [6, 1, 7, 2]
    kernel.store(k, v, pages, inputs_of((0, context_len, table)))
    result = kernel.attend(q, pages, inputs_of((context_len - num_rows, num_rows, table)), head_dim**-0.5)
    expected, bound = exact_attention(q, k.to(dtype), v.to(dtype), head_dim**-0.5)
    assert_within(result, expected, bound, "attention")


@every_kernel
def test_scores_that_overflow_exp_are_fine(kernel: AttentionKernel) -> None:
    """Bug: exp of a score of 1,000 without taking the maximum off first."""
    pages = nan_pages(2, 1, 8, torch.float32)
    q, k, v = (100 * random_tokens(6, 1, 8, seed) for seed in (1, 2, 3))
    inputs = inputs_of((0, 6, [1, 0]))
    kernel.store(k, v, pages, inputs)
    expected, bound = exact_attention(q, k, v, 1.0)
    assert_within(kernel.attend(q, pages, inputs, 1.0), expected, bound)


@every_kernel
def test_a_sequence_does_not_depend_on_the_others(kernel: AttentionKernel) -> None:
    """Bitwise: alone, between others, and beside one whose pages are full of NaN."""
    pages = nan_pages(9, 2, 8, torch.float16)
    tables = [[3, 0], [8, 5, 1], [7, 2]]
    lengths, rows = [22, 38, 25], [1, 38, 3]
    for table, length, seed in zip(tables[:2], lengths, (1, 2), strict=False):
        kernel.store(
            random_tokens(length, 2, 8, seed), random_tokens(length, 2, 8, -seed), pages, inputs_of((0, length, table))
        )
    slices = [(length - n, n, table) for length, n, table in zip(lengths, rows, tables, strict=True)]
    queries = [random_tokens(n, 4, 8, 9 + n) for n in rows]
    together = torch.split(kernel.attend(torch.cat(queries), pages, inputs_of(*slices), 0.3), rows)
    for i in (0, 1):
        assert torch.equal(together[i], kernel.attend(queries[i], pages, inputs_of(slices[i]), 0.3))
    assert bool(together[2].isnan().all())  # nothing was stored for it


@every_kernel
def test_values_beyond_float16_saturate(kernel: AttentionKernel) -> None:
    """Bug: one huge value becomes an infinity in the cache and every later token of the sequence NaN."""
    pages = nan_pages(1, 1, 8, torch.float16)
    huge = torch.full((2, 1, 8), 1e6)
    kernel.store(huge, -huge, pages, inputs_of((0, 2, [0])))
    result = kernel.attend(torch.ones(2, 1, 8), pages, inputs_of((0, 2, [0])), 1.0)
    assert_within(result, torch.full_like(result, -65504.0), 65504 * 4 * EPS)


def test_blocks_of_query_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is attended in blocks that bound the memory of the reference's scores; a block may be one row."""
    monkeypatch.setattr("kernels.attention.f16.reference.MAX_KEYS", 2 * 64 * 16)
    test_precision(kernels_for("f16")[-1], (4, 2, 16), torch.float16, 53, 53)


def test_pages_of_another_dtype_are_refused_with_the_reason() -> None:
    spec = AttentionSpec(4, 2, 16, 16, torch.device("cpu"), torch.float32, torch.float8_e4m3fn)
    reference = kernels_for("f16")[-1]
    assert "float8_e4m3fn" in (reference.refuses(spec) or "")


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_the_reference_stores_bfloat16(dtype: torch.dtype) -> None:
    """Bugs: an error, as bfloat16 does not reach the largest float32; an infinity, as the largest float16 rounds up in
    bfloat16. A GPU whose cache has no kernel there runs on the reference."""
    (reference,) = (kernel for kernel in kernels_for("f16") if kernel.name == "reference")
    pages = nan_pages(1, 1, 8, dtype)
    rows = torch.full((1, 1, 8), 1e5, dtype=torch.bfloat16)
    reference.store(rows, rows, pages, inputs_of((0, 1, [0])))
    limit = torch.finfo(torch.float16).max if dtype == torch.float16 else float(rows[0, 0, 0])
    assert torch.equal(values_of(pages)[0, :, 0], torch.full((1, 8), limit, dtype=dtype))
