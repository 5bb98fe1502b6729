"""Every back end of every cache codec: paging apart from precision, then precision against float64."""

import math

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from kernels.attention.f16.layout import CACHE_DTYPES, page_shape
from kernels.attention.registry import kernels_for
from kernels.contract import AttentionInputs, AttentionKernel, AttentionSpec
from tests.tolerance import EPS, assert_within, dot_bound

PAGE_SIZE = 4
HEADS = [(1, 1, 8), (4, 2, 16), (6, 1, 10), (3, 3, 24)]  # num_heads, num_kv_heads, head_dim


def named(kernel: AttentionKernel) -> str:
    return kernel.name


every_kernel = pytest.mark.parametrize("kernel", kernels_for("f16"), ids=named)


def nan_pages(num_pages: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Pages nobody has written: whatever reads them shows it."""
    return torch.full((num_pages, *page_shape(num_kv_heads, PAGE_SIZE, head_dim)), torch.nan, dtype=dtype)


def inputs_of(*rows: tuple[int, int, list[int]]) -> AttentionInputs:
    """(start, number of rows, block table) of each sequence."""
    return build_batch(
        [BatchRow([0] * num_rows, start, table, PAGE_SIZE, 0) for start, num_rows, table in rows]
    ).attention


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """torch's attention in float64 and a bound on a float32 computation of it.

    q: [rows, heads, D], the last rows of the sequence; k, v: [n, kv_heads, D] -> result and bound, q's shape.

    A score is a dot product of D terms, off by at most dot_bound, and rounded again when scaled and when the row's
    maximum is taken off. A weight exp(s) is off relatively by its score's error and a few roundings, its normalized
    value by at most twice the row's worst; the weighted sum of values is a dot product again.
    """
    group = q.shape[1] // k.shape[1]
    num_keys, first = k.shape[0], k.shape[0] - q.shape[0]
    heads_q = q.double().transpose(0, 1)  # [heads, rows, D]
    heads_k, heads_v = (t.double().repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))  # [heads, n, D]
    visible = torch.arange(num_keys) <= torch.arange(first, num_keys)[:, None]  # [rows, n]
    exact = torch.nn.functional.scaled_dot_product_attention(
        heads_q[None], heads_k[None], heads_v[None], attn_mask=visible, scale=scale
    )[0]
    bounds = []
    for head_q, head_k, head_v in zip(heads_q, heads_k, heads_v, strict=True):
        scores = scale * head_q @ head_k.T  # [rows, n]
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        score_error = scale * dot_bound(head_q, head_k) + 2 * EPS * scores.abs()
        worst = score_error.masked_fill(~visible, 0).amax(-1, keepdim=True) + 4 * EPS  # [rows, 1]
        bounds.append(2 * worst * (weights @ head_v.abs()) + dot_bound(weights, head_v.T))
    return exact.transpose(0, 1), torch.stack(bounds).transpose(0, 1)


def random_tokens(num_tokens: int, heads: int, head_dim: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed))


@every_kernel
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("chunks", [[11], [3, 8], [4, 4, 3], [1] * 11, [5, 1, 1, 4]])
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
        assert_within(result, expected, 16 * EPS * expected, "mean of the visible values")
        start += num_rows


@every_kernel
def test_store_writes_its_slots_and_nothing_else(kernel: AttentionKernel) -> None:
    """Bug: a page another sequence shares is touched."""
    pages = nan_pages(4, 2, 8, torch.float32)
    k, v = random_tokens(3, 2, 8, 1), random_tokens(3, 2, 8, 2)
    kernel.store(k, v, pages, inputs_of((3, 3, [2, 1])))
    assert torch.equal(pages[2, 0, :, 3], k[0])
    assert torch.equal(pages[1, 0, :, :2], k[1:].transpose(0, 1))
    assert torch.equal(pages[1, 1, :, :2], v[1:].transpose(0, 1))
    assert int(pages.isnan().logical_not().sum()) == 2 * k.numel()


@every_kernel
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("context_len", "num_rows"), [(1, 1), (4, 4), (13, 13), (13, 1), (13, 6), (9, 5)])
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
    lengths, rows = [6, 10, 8], [1, 10, 3]
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


@every_kernel
def test_blocks_of_query_rows_agree(kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is attended in blocks that bound the memory of the scores; a block may be a single row."""
    monkeypatch.setattr("kernels.attention.f16.reference.MAX_KEYS", 4 * 13 * 3)
    test_precision(kernel, (4, 2, 16), torch.float16, 13, 13)


def test_pages_of_another_dtype_are_refused_with_the_reason() -> None:
    spec = AttentionSpec(4, 2, 16, 16, torch.device("cpu"), torch.float32, torch.float8_e4m3fn)
    reference = kernels_for("f16")[-1]
    assert "float8_e4m3fn" in (reference.refuses(spec) or "")
