"""Attention over the quantized cache: which token is read in which precision, how exactly, and nothing beside it.

The codec has its own tests; here what a page decodes to is taken from it.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from kernels import native
from kernels.attention.quantized import KERNELS
from kernels.attention.quantized.cache import LayerCodec, QuantizedCache, QuantizedKernel
from kernels.attention.quantized.layout import RECENT_TOKENS
from kernels.attention.quantized.transforms import Hadamard, Identity, Permutation
from kernels.contract import AttentionInputs
from tests.kernels.kv_oracle import cache_of as empty_cache
from tests.kernels.kv_oracle import row_codec
from tests.tolerance import EPS, assert_within

PAGE_SIZE = 16
WINDOW, SINKS = 20, 4
NUM_PAGES, NUM_RECENT = 40, 46
TABLES = [list(range(38, -1, -2)), list(range(39, 0, -2))]


def named(kernel: QuantizedKernel) -> str:
    return kernel.name


# The bounds are those of float32 products; the C++ kernel rounds queries and weights and has bounds of its own
# (test_native_kv.py).
every_kernel = pytest.mark.parametrize("kernel", KERNELS[-1:], ids=named)


def codec_of(bits: tuple[float, float], window: int = WINDOW, num_sinks: int = SINKS, head_dim: int = 32) -> LayerCodec:
    keys, values = (row_codec(width, head_dim, head_dim // 2, 2, seed=7 + i) for i, width in enumerate(bits))
    return LayerCodec(keys, values, Identity(), Identity(), window, num_sinks)


def cache_of(codec: LayerCodec, dtype: torch.dtype = torch.float16) -> QuantizedCache:
    """Full of bytes that decode to NaN and of NaN: whatever is read unwritten shows."""
    cache = empty_cache(codec, (NUM_PAGES, PAGE_SIZE, NUM_RECENT), dtype)
    cache.pages.fill_(0x7F)
    cache.recent.fill_(torch.nan)
    return cache


def row_of(codec: LayerCodec, start: int, num_rows: int, which: int) -> BatchRow:
    """Sequence `which` has TABLES[which], and just the recent pages that it reads or writes, handed out in turn."""
    stop = start + num_rows
    kept = [j for j in range(stop) if j < codec.num_sinks or (codec.window > 0 and j > start - codec.window)]
    pages = {j // RECENT_TOKENS for j in kept}
    recent = {page: 2 * (7 * page % 23) + which for page in pages}
    return BatchRow([0] * num_rows, start, TABLES[which], PAGE_SIZE, 0, recent)


def inputs_of(codec: LayerCodec, *rows: tuple[int, int, int]) -> AttentionInputs:
    """(start, number of rows, which) of each sequence."""
    return build_batch([row_of(codec, *row) for row in rows]).attention


def step(
    kernel: QuantizedKernel, rows: tuple[Tensor, Tensor, Tensor], cache: QuantizedCache, inputs: AttentionInputs
) -> Tensor:
    q, k, v = rows
    kernel.store(k, v, cache, inputs)
    return kernel.attend(q, cache, inputs, 0.3)


def tokens(num_tokens: int, seed: int, head_dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """q with four heads, k and v with two."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(num_tokens, heads, head_dim, generator=generator) for heads in (4, 2, 2))
    return 2 * q, k, v


def cut(rows: tuple[Tensor, Tensor, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rows
    return q[start:stop], k[start:stop], v[start:stop]


def run(
    kernel: QuantizedKernel,
    rows: tuple[Tensor, Tensor, Tensor],
    cache: QuantizedCache,
    chunks: list[int],
    which: int = 0,
) -> Tensor:
    """A whole sequence, in chunks."""
    results, start = [], 0
    for n in chunks:
        inputs = inputs_of(cache.codec, (start, n, which))
        results.append(step(kernel, cut(rows, start, start + n), cache, inputs))
        start += n
    return torch.cat(results)


def chunks_of(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


def exact_attention(rows: tuple[Tensor, Tensor, Tensor], cache: QuantizedCache, scale: float) -> tuple[Tensor, Tensor]:
    """A whole sequence in float64 under the read rule, and a bound on a float32 computation of it; each q's shape.

    The bound is that of tests/kernels/test_attention.py, with the keys and values that the row itself reads: a score is
    a dot product of D terms, a weight is off by its score's error, and the weighted sum is a dot product again.
    """
    q, k, v = rows
    codec, length, group = cache.codec, len(q), q.shape[1] // k.shape[1]
    at = torch.arange(length)
    is_high = (at < codec.num_sinks) | (at[:, None] - at < codec.window)  # [i, j]
    read = []  # keys and values, [heads, i, j, D]
    for x, part in ((k, codec.keys), (v, codec.values)):
        packed, high = part.decode(*part.encode(x)), x.to(cache.recent.dtype)
        both = torch.where(is_high[:, :, None, None], high.double(), packed.double())  # [i, j, kv heads, D]
        read.append(both.repeat_interleave(group, dim=2).permute(2, 0, 1, 3))
    keys, values = read
    queries = q.double().transpose(0, 1)[:, :, None]  # [heads, i, 1, D]
    visible = at <= at[:, None]
    terms = queries * keys * scale
    scores = terms.sum(-1)  # [heads, i, j]
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)[..., None]
    score_error = 4 * EPS * math.sqrt(q.shape[-1]) * terms.norm(dim=-1) + 2 * EPS * scores.abs()
    worst = score_error.masked_fill(~visible, 0).amax(-1, keepdim=True) + 4 * EPS
    bound = 2 * worst * (weights * values.abs()).sum(2) + 4 * EPS * math.sqrt(length) * (weights * values).norm(dim=2)
    return (weights * values).sum(2).transpose(0, 1), bound.transpose(0, 1)


@every_kernel
@pytest.mark.parametrize("window", [0, 1, 3, 12])
@pytest.mark.parametrize("num_sinks", [0, 1, 4])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 7], [2, 1, 6, 3]], ids=str)
def test_who_is_read_in_which_precision(
    kernel: QuantizedKernel, window: int, num_sinks: int, chunks: list[int]
) -> None:
    """Bugs: a window that is one token too long or short, a chunk that overwrites the window it still needs, sinks that
    are lost at a chunk's edge.

    Token j has the value 1.1 in group j of the channels, 0 elsewhere: in high precision 1.1, from the page 1.125. A
    zero query weighs all alike, so channel j of row i shows in which precision i read j.
    """
    codec = LayerCodec(row_codec(4.0, 64, 64, 2), row_codec(4.0, 64, 4, 2), Identity(), Identity(), window, num_sinks)
    cache = cache_of(codec, dtype=torch.float32)
    at = torch.arange(12)
    v = torch.zeros(12, 2, 64)
    v[:, :, :48] = 1.1 * torch.eye(12).repeat_interleave(4, -1)[:, None]
    q, k, _ = tokens(12, seed=1, head_dim=64)
    result = run(kernel, (torch.zeros_like(q), k, v), cache, chunks)
    read = torch.where((at < num_sinks) | (at[:, None] - at < window), 1.1, 1.125).masked_fill(at > at[:, None], 0)
    expected = (read / (at[:, None] + 1)).repeat_interleave(4, -1)[:, None].expand(-1, 4, -1)  # [i, heads, channels]
    assert_within(result[..., :48], expected, 16 * EPS * expected, "mean of the values as read")


@every_kernel
@pytest.mark.parametrize(
    "bits", [(16.0, 16.0), (8.0, 8.0), (4.0, 4.0), (3.0, 2.0), (2.0, 1.5), (1.5, 3.0), (16.0, 2.0)]
)
@pytest.mark.parametrize("length", [1, 19, 20, 21, 53])
def test_precision(kernel: QuantizedKernel, bits: tuple[float, float], length: int) -> None:
    """Against float64 over the values as read: shorter than the window, as long, and longer; the last page unfilled."""
    cache = cache_of(codec_of(bits))
    rows = tokens(length, seed=2)
    expected, bound = exact_attention(rows, cache, 0.3)
    assert_within(run(kernel, rows, cache, [length]), expected, bound, "prompt")
    assert_within(run(kernel, rows, cache_of(codec_of(bits)), [1] * length), expected, bound, "decoding")


@every_kernel
@pytest.mark.parametrize(("size", "length"), [(1, 60), (5, 90), (16, 90), (64, 310)])
def test_chunks_do_not_change_a_bit(kernel: QuantizedKernel, size: int, length: int) -> None:
    """Output, pages, window and sinks: whatever size the prompt was cut to, beside a neighbour or alone, for long."""
    rows, others = tokens(length, seed=3), tokens(length, seed=4)
    whole = cache_of(codec_of((4.0, 2.0)))
    expected = run(kernel, rows, whole, [length])
    cache = cache_of(codec_of((4.0, 2.0)))
    start, results = 0, []
    for n in chunks_of(length, size):
        neighbour = max(1, length - start - n)  # runs the other way round, so that the shapes never agree
        pairs = zip(cut(others, 0, neighbour), cut(rows, start, start + n), strict=True)
        q, k, v = (torch.cat(pair) for pair in pairs)
        inputs = inputs_of(cache.codec, (0, neighbour, 1), (start, n, 0))
        results.append(step(kernel, (q, k, v), cache, inputs)[-n:])
        start += n
    assert torch.equal(torch.cat(results), expected)
    held = torch.tensor(TABLES[0])
    assert torch.equal(cache.pages[held], whole.pages[held])
    recent = torch.tensor(list(row_of(cache.codec, length, 0, 0).recent_table.values()))
    assert torch.equal(cache.recent[recent].nan_to_num(7), whole.recent[recent].nan_to_num(7))


@pytest.mark.parametrize(
    "kernel",
    [k for k in KERNELS if k.name == "reference" or (k.name == "native" and native.MISSING is None)],
    ids=named,
)
@pytest.mark.parametrize("windows", [(None, 50), (60, None), (310, 21), (None, 1)])
def test_every_sequence_has_its_own_window(kernel: QuantizedKernel, windows: tuple[int | None, int | None]) -> None:
    """Bugs: a step in which the first sequence's window holds for all; a longer window that gives other bits than a
    cache whose own window is as long."""
    codec, length = codec_of((4.0, 2.0)), 310
    cache = cache_of(codec)
    rows = tokens(length, seed=3), tokens(length, seed=4)
    own = [replace(codec, window=codec.window if window is None else window) for window in windows]
    expected = [run(kernel, rows[i], cache_of(own[i]), [length], i) for i in range(2)]
    results: list[list[Tensor]] = [[], []]
    for start, stop in pairwise([0, 40, 41, 250, length]):
        at = [replace(row_of(own[i], start, stop - start, i), window=windows[i]) for i in range(2)]
        parts = [torch.cat(pair) for pair in zip(*(cut(rows[i], start, stop) for i in range(2)), strict=True)]
        q, k, v = parts
        found = step(kernel, (q, k, v), cache, build_batch(at).attention)
        for i in range(2):
            results[i].append(found[i * (stop - start) : (i + 1) * (stop - start)])
    for i in range(2):
        assert torch.equal(torch.cat(results[i]), expected[i])


@every_kernel
def test_nothing_of_another_owner_reaches_a_result(kernel: QuantizedKernel) -> None:
    """Bug: bytes of an earlier owner that decode to NaN, or to numbers, below a weight of zero."""
    rows = tokens(37, seed=5)
    results = []
    for byte in (0x7F, 0x00, 0x35):
        cache = cache_of(codec_of((4.0, 4.0)))
        cache.pages.fill_(byte)
        results.append(run(kernel, rows, cache, [30, 1, 6]))
    assert not bool(results[0].isnan().any())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_kernel
def test_a_step_taken_back_leaves_no_trace(kernel: QuantizedKernel) -> None:
    """Speculation: three tokens are stored, two are taken back, others come."""
    rows, guessed = tokens(60, seed=6), tokens(60, seed=7)
    expected = run(kernel, rows, cache_of(codec_of((4.0, 4.0))), [50, 1, 9])
    cache = cache_of(codec_of((4.0, 4.0)))
    first = run(kernel, rows, cache, [50])
    wrong = tuple(torch.cat((a[50:51], b[51:53])) for a, b in zip(rows, guessed, strict=True))
    q, k, v = wrong
    second = step(kernel, (q, k, v), cache, inputs_of(cache.codec, (50, 3, 0)))[:1]
    third = step(kernel, cut(rows, 51, 60), cache, inputs_of(cache.codec, (51, 9, 0)))
    assert torch.equal(torch.cat((first, second, third)), expected)


@every_kernel
def test_a_shared_prefix_gives_the_same_bits(kernel: QuantizedKernel) -> None:
    """What a prefix hit must bring: full pages, and the recent pages of the window and the sinks, all by reference."""
    rows = tokens(50, seed=8)
    cache = cache_of(codec_of((2.0, 2.0)))
    run(kernel, rows, cache, [32])
    expected = step(kernel, cut(rows, 32, 50), cache, inputs_of(cache.codec, (32, 18, 0)))
    shared, own = row_of(cache.codec, 32, 18, 0), row_of(cache.codec, 32, 18, 1)
    cache.recent[list({page for at, page in shared.recent_table.items() if at >= 2})] = torch.nan
    child = replace(
        shared,
        block_table=[*TABLES[0][:2], *TABLES[1][2:]],
        recent_table={at: (shared if at < 2 else own).recent_table[at] for at in shared.recent_table},
    )
    assert torch.equal(step(kernel, cut(rows, 32, 50), cache, build_batch([child]).attention), expected)


@every_kernel
def test_a_window_that_is_not_there_is_an_error(kernel: QuantizedKernel) -> None:
    """Bug: a hit whose window was given away, read from the last page of the pool."""
    cache, rows = cache_of(codec_of((4.0, 4.0))), tokens(40, seed=8)
    run(kernel, rows, cache, [39])
    row = row_of(cache.codec, 39, 1, 0)
    held = {at: page for at, page in row.recent_table.items() if at != 1}
    with pytest.raises(ValueError, match=r"positions \[20, 21, .*31\] are read in high precision and have no recent"):
        step(kernel, cut(rows, 39, 40), cache, build_batch([replace(row, recent_table=held)]).attention)
    with pytest.raises(ValueError, match="the step has no recent pages"):
        step(kernel, cut(rows, 39, 40), cache, build_batch([replace(row, recent_table={})]).attention)


@every_kernel
def test_transforms_are_made_before_and_undone_after(kernel: QuantizedKernel) -> None:
    """Bugs: a window of unturned keys beside turned queries; an output turned back in part, or by the keys' way."""
    plain = codec_of((4.0, 2.0))
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    turned = replace(plain, key_transform=Hadamard(), value_transform=Permutation(order))
    q, k, v = tokens(40, seed=9)
    found = run(kernel, (q, k, v), cache_of(turned), [31, 9])
    by_hand = (turned.key_transform.apply(q), turned.key_transform.apply(k), turned.value_transform.apply(v))
    expected = turned.value_transform.invert(run(kernel, by_hand, cache_of(plain), [31, 9]))
    assert torch.equal(found, expected)


@every_kernel
def test_infinities_saturate_and_nan_shows(kernel: QuantizedKernel) -> None:
    """Bugs: one infinity that turns the rest of a sequence into NaN; a broken model whose NaN a page hides."""
    codec = replace(codec_of((4.0, 4.0), window=2, num_sinks=0), value_transform=Hadamard(), key_transform=Hadamard())
    q, k, v = tokens(8, seed=10)
    v[1, 0, 3:5], k[2, 1, 5:7] = torch.inf, -torch.inf  # two, which a rotation would subtract
    assert bool(run(kernel, (q, k, v), cache_of(codec), [8]).isfinite().all())
    v[1, 0, 3] = torch.nan
    result = run(kernel, (q, k, v), cache_of(codec), [1] * 8)
    assert bool(result[0].isfinite().all())
    assert bool(result[1:, :2].isnan().all())  # in high precision at first, from the page later
    assert bool(result[:, 2:].isfinite().all())  # another kv head


@every_kernel
def test_scores_that_overflow_exp_are_fine(kernel: QuantizedKernel) -> None:
    """Bug: exp of a score of thousands without taking the maximum of both precisions off first."""
    q, k, v = tokens(40, seed=11)
    cache = cache_of(codec_of((8.0, 8.0)))
    expected, bound = exact_attention((100 * q, 10 * k, v), cache, 0.3)
    assert_within(run(kernel, (100 * q, 10 * k, v), cache, [40]), expected, bound)


@every_kernel
def test_activations_of_half_precision_come_back_as_they_came(kernel: QuantizedKernel) -> None:
    q, k, v = (x.to(torch.bfloat16) for x in tokens(20, seed=12))
    result = run(kernel, (q, k, v), cache_of(codec_of((4.0, 4.0))), [20])
    expected = run(kernel, (q.float(), k.float(), v.float()), cache_of(codec_of((4.0, 4.0))), [20])
    assert torch.equal(result, expected.to(torch.bfloat16))


@every_kernel
def test_blocks_of_tiles_agree(kernel: QuantizedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is attended in blocks that bound the memory of the scores."""
    rows = tokens(53, seed=13)
    expected = run(kernel, rows, cache_of(codec_of((4.0, 4.0))), [53])
    monkeypatch.setattr("kernels.attention.quantized.reference.MAX_KEYS", 1)
    assert torch.equal(run(kernel, rows, cache_of(codec_of((4.0, 4.0))), [53]), expected)


def test_memory_of_another_shape_is_refused() -> None:
    """Bug: pages of another policy, or a window of other heads, read as if they were ours."""
    cache = cache_of(codec_of((4.0, 4.0)))
    with pytest.raises(ValueError, match=r"^pages of keys 4-bit"):
        replace(cache, pages=cache.pages[..., :-1])
    with pytest.raises(ValueError, match=r"^recent pages of keys 4-bit.*\[46, 2, 2, 15, 32\]"):
        replace(cache, recent=cache.recent[:, :, :, :-1])
