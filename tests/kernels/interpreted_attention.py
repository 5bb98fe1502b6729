"""The Triton kernels of both caches under Triton's interpreter. test_gpu_attention.py runs this file in a process of
its own with TRITON_INTERPRET=1, which must be set before triton is imported.

The interpreter takes a tenth of a second for a tile: contexts are short, and splits shorter.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from kernels.attention.f16.gpu import F16Triton, merge
from kernels.attention.f16.layout import page_shape
from kernels.attention.f16.reference import F16Reference
from kernels.attention.quantized.cache import KeyShift, LayerCodec, QuantizedCache, QuantizedKernel
from kernels.attention.quantized.gpu import QuantizedTriton
from kernels.attention.quantized.reference import QuantizedReference
from kernels.attention.quantized.transforms import Chain, Hadamard, Identity, Permutation
from kernels.contract import AttentionKernel
from kernels.gpu.steps import Launch
from kernels.transfer import send
from tests.kernels.attention_oracle import random_tokens
from tests.kernels.kv_oracle import cache_of as empty_cache
from tests.kernels.kv_oracle import row_codec
from tests.kernels.test_attention import inputs_of as plain_inputs
from tests.kernels.test_kv_attention import cache_of, codec_of, cut, inputs_of, row_of, tokens
from tests.tolerance import EPS, assert_within

SPLIT, BLOCK = 32, 32  # positions; the shipped ones are 512 and 64
KERNEL, REFERENCE = QuantizedTriton(SPLIT, BLOCK), QuantizedReference()
FIXED = QuantizedTriton(SPLIT, BLOCK, fixed=True)
PLAIN, FIXED_PLAIN = F16Triton(SPLIT, BLOCK), F16Triton(SPLIT, BLOCK, fixed=True)
SCALE = 0.3
# Parameters nobody wrote, and those of a NaN, become infinite in kernels/gpu/decode_steps.py, of which numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
HALF = 2.0**-11  # relative error of a rounding to float16
TINY = 2.0**-25  # and its error below 2^-14
PAIRS = [(4.0, 4.0), (2.0, 1.5), (8.0, 3.0), (3.0, 2.0), (1.5, 16.0), (16.0, 8.0)]  # each width on either side


def read_as(rows: tuple[Tensor, Tensor, Tensor], cache: QuantizedCache) -> tuple[Tensor, Tensor]:
    """Keys and values j as row i reads them, [heads, i, j, D] float64."""
    q, k, v = rows
    codec, at = cache.codec, torch.arange(len(k))
    is_high = (at < codec.num_sinks) | (at[:, None] - at < codec.window)  # [i, j]
    read = []
    for x, part in ((k, codec.keys), (v, codec.values)):
        packed = part.decode(*part.encode(x)).double()
        both = torch.where(is_high[:, :, None, None], x.half().double(), packed)  # [i, j, kv heads, D]
        read.append(both.repeat_interleave(q.shape[1] // k.shape[1], dim=2).permute(2, 0, 1, 3))
    return read[0], read[1]


def code_parts(rows: tuple[Tensor, Tensor, Tensor], cache: QuantizedCache) -> tuple[Tensor, Tensor]:
    """code s of keys and values, [heads, 1, j, D] float64, without the zero of their groups."""
    found = []
    for x, part in zip(rows[1:], (cache.codec.keys, cache.codec.values), strict=True):
        codes = torch.zeros_like(x, dtype=torch.float64)
        if part.layout.num_groups:
            zeros = part.quantize(x)[2].double() * part.prescale[:, None]
            codes = part.decode(*part.encode(x)).double() - zeros.repeat_interleave(part.layout.group_size, dim=-1)
        found.append(codes.repeat_interleave(rows[0].shape[1] // x.shape[1], dim=1).transpose(0, 1)[:, None])
    return found[0], found[1]


def exact(rows: tuple[Tensor, Tensor, Tensor], cache: QuantizedCache, num_rows: int) -> tuple[Tensor, Tensor]:
    """exact_attention of the last rows of a sequence over a quantized cache."""
    keys, values = (x[:, -num_rows:] for x in read_as(rows, cache))
    prescale = float(torch.cat((cache.codec.keys.prescale, cache.codec.values.prescale)).max())
    return exact_attention(rows[0][-num_rows:], keys, values, prescale, code_parts(rows, cache))


def exact_attention(
    q: Tensor, keys: Tensor, values: Tensor, prescale: float, codes: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention in float64 and a bound on the kernels; both q's shape. keys, values: as read_as gives them.

    To float32's own error (tests/kernels/attention_oracle.py) come roundings to float16: of a query's channel, divided
    by a power of two below the largest, and of a key's channel, in units of the prescale: two for each term of a score.
    Likewise of a weight, which is at most 1, and of a value; a weight's error also moves what all are divided by.

    Where codes are multiplied (kernels/gpu/decode_steps.py), not what they mean, the two roundings of a weight, before
    and after its scale, count for code s in place of the value, and float32's error of a score for code s beside the
    key.
    """
    queries = q.double().transpose(0, 1)[:, :, None] * SCALE  # [heads, i, 1, D]
    num_rows, num_keys = keys.shape[1:3]
    visible = torch.arange(num_keys) <= torch.arange(num_keys - num_rows, num_keys)[:, None]
    parts = codes or (torch.zeros_like(keys), torch.zeros_like(values))
    keys, values, key_codes, value_codes = (x.masked_fill(~visible[:, :, None], 0) for x in (keys, values, *parts))
    sizes = torch.maximum(values.abs(), value_codes.abs())
    terms = queries * keys
    scores = terms.sum(-1)  # [heads, i, j]
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)[..., None]
    relative = 2 * HALF + EPS * math.sqrt(q.shape[-1])
    tiny = queries.abs().amax(-1) * keys.abs().sum(-1) + prescale * queries.abs().sum(-1)
    worst = (4 * relative * terms.norm(dim=-1) + TINY * tiny + 2 * EPS * scores.abs()).amax(-1, keepdim=True)
    worst += 4 * EPS * (num_keys / SPLIT + 1)
    worst += 4 * EPS * math.sqrt(q.shape[-1]) * (queries * key_codes).norm(dim=-1).amax(-1, keepdim=True)
    result = (weights * values).sum(2)
    bound = 2 * worst * (weights * values.abs()).sum(2)
    bound += 4 * (2 * HALF + EPS * math.sqrt(num_keys)) * (weights * sizes).norm(dim=2)
    bound += 4 * HALF * weights.norm(dim=2) * result.abs()
    bound += TINY * (weights.amax(2) * sizes.sum(2) + prescale)
    return result.transpose(0, 1), bound.transpose(0, 1)


def filled(rows: tuple[Tensor, Tensor, Tensor], cache: QuantizedCache, chunk: int = 64) -> None:
    """Store a whole sequence by the reference; recent pages that are not its own decode to NaN."""
    for start in range(0, len(rows[1]), chunk):
        stop = min(start + chunk, len(rows[1]))
        _, k, v = cut(rows, start, stop)
        REFERENCE.store(k, v, cache, inputs_of(cache.codec, (start, stop - start, 0)))


@pytest.mark.parametrize("bits", PAIRS, ids=str)
def test_store_writes_the_bytes_of_the_reference(bits: tuple[float, float]) -> None:
    """Bugs: a fused operation that moves a code, a tie rounded away from the even one, a byte beside the token's."""
    codec = codec_of(bits)
    _, k, v = tokens(5, seed=1)
    k[0, 0, :16], k[1, 1], v[2, 0, 3], v[3, 1, :16] = 0.0, 1e5, -torch.inf, 2.0**-12
    k[2, 0, :16] = torch.arange(16) / 2  # ties
    if 16.0 not in bits:
        k[3, 0, 5] = v[4, 1, 20] = torch.nan
    inputs = inputs_of(codec, (13, 5, 0))
    caches = [cache_of(codec), cache_of(codec)]
    kernels: tuple[QuantizedKernel, ...] = (KERNEL, REFERENCE)
    for kernel, cache in zip(kernels, caches, strict=True):
        kernel.store(k, v, cache, inputs)
    assert torch.equal(caches[0].pages, caches[1].pages)
    assert torch.equal(caches[0].recent.nan_to_num(7), caches[1].recent.nan_to_num(7))


@pytest.mark.parametrize("bits", PAIRS, ids=str)
def test_every_width(bits: tuple[float, float]) -> None:
    """Bugs: a code, a scale or a zero of another channel, group or token; a prescale left out."""
    cache, rows = cache_of(codec_of(bits, window=9)), tokens(37, seed=2)
    filled(rows, cache)
    expected, bound = exact(rows, cache, 3)
    found = KERNEL.attend(rows[0][-3:], cache, inputs_of(cache.codec, (34, 3, 0)), SCALE)
    assert_within(found, expected, bound)


@pytest.mark.parametrize(("window", "num_sinks"), [(0, 0), (0, 3), (1, 0), (17, 20), (40, 0)])
def test_who_is_read_in_which_precision(window: int, num_sinks: int) -> None:
    """Bugs: a window one token too long or short, sinks taken from the page, a token read twice. 2 bits tell them apart
    by far more than the bound."""
    cache, rows = cache_of(codec_of((2.0, 2.0), window, num_sinks)), tokens(35, seed=3)
    filled(rows, cache)
    expected, bound = exact(rows, cache, 4)
    found = KERNEL.attend(rows[0][-4:], cache, inputs_of(cache.codec, (31, 4, 0)), SCALE)
    assert_within(found, expected, bound)


def test_a_row_does_not_depend_on_its_batch_its_chunk_or_their_windows() -> None:
    """A prompt in one piece folds its splits in the program, a decode step in `merge`: both must give the same bits."""
    cache, rows = cache_of(codec_of((4.0, 2.0), window=7)), tokens(44, seed=4)
    filled(rows, cache)
    others = cut(rows, 0, 20)
    row = row_of(cache.codec, 0, 20, 1)
    batch = build_batch([replace(row, window=15), row_of(cache.codec, 30, 14, 0)])
    KERNEL.store(others[1][:2], others[2][:2], cache, inputs_of(cache.codec, (0, 2, 1)))
    filled_pages = cache.pages.clone()
    whole = FIXED.attend(torch.cat((others[0], rows[0][30:])), cache, batch.attention, SCALE)[20:]
    for start, stop in ((31, 33), (43, 44)):
        alone = FIXED.attend(rows[0][start:stop], cache, inputs_of(cache.codec, (start, stop - start, 0)), SCALE)
        assert torch.equal(alone, whole[start - 30 : stop - 30])
    assert bool(whole.isfinite().all())
    assert torch.equal(cache.pages, filled_pages)


@pytest.mark.parametrize("split", [32, 512])
def test_tiles_of_prompts(split: int) -> None:
    """Bugs: rows of a tile that see what comes after them, a window taken from the tile's first row for all; sums of
    packed tokens that stay in units of the prescale where high precision follows; a part of the context left out."""
    cache, rows = cache_of(codec_of((4.0, 2.0), window=9)), tokens(44, seed=11)
    filled(rows, cache)
    expected, bound = exact(rows, cache, 24)
    kernel = QuantizedTriton(split, BLOCK)
    assert_within(kernel.attend(rows[0][-24:], cache, inputs_of(cache.codec, (20, 24, 0)), SCALE), expected, bound)


def test_a_window_that_is_not_there_shows() -> None:
    """Bug: a hit whose window was given away, read from whatever page comes first."""
    cache, rows = cache_of(codec_of((4.0, 4.0))), tokens(40, seed=5)
    filled(rows, cache)
    row = row_of(cache.codec, 39, 1, 0)
    held = {at: page for at, page in row.recent_table.items() if at != 1}
    inputs = build_batch([replace(row, recent_table=held)]).attention
    assert bool(KERNEL.attend(rows[0][39:], cache, inputs, SCALE).isnan().all())
    with pytest.raises(ValueError, match="the step has no recent pages"):
        KERNEL.attend(rows[0][39:], cache, build_batch([replace(row, recent_table={})]).attention, SCALE)


def calibrated() -> LayerCodec:
    """Means taken off, channels scaled and sorted, a clip for each group."""
    codec, generator = codec_of((3.0, 2.0)), torch.Generator().manual_seed(6)
    order = torch.stack([torch.randperm(32, generator=generator) for _ in range(2)])
    scale = 2.0 ** torch.randint(-3, 4, (2, 32), generator=generator)
    shift = KeyShift(torch.randn(2, 32, generator=generator), scale)
    turns = Chain((Permutation(order), Hadamard()))
    return replace(codec, key_transform=turns, value_transform=Permutation(order.flip(-1)), key_shift=shift)


def hadamard() -> LayerCodec:
    return replace(codec_of((4.0, 4.0)), key_transform=Hadamard(), value_transform=Hadamard())


def shifted() -> LayerCodec:
    return replace(calibrated(), key_transform=Hadamard(), value_transform=Hadamard())


@pytest.mark.parametrize("codec_named", [hadamard, calibrated, shifted])
def test_heads_are_turned_before_and_turned_back_after(codec_named: Callable[[], LayerCodec]) -> None:
    """Bugs: an addition of the rotation in another order, so that bytes differ from those another back end wrote;
    infinities that meet in it; queries turned by the values' way, an output turned back in part."""
    codec = codec_named()
    plain = replace(codec, key_transform=Identity(), value_transform=Identity(), key_shift=None)
    q, k, v = tokens(3, seed=6)
    k[0, 0, :2] = v[1, 1, 3:5] = torch.tensor([torch.inf, -torch.inf])
    inputs = inputs_of(codec, (0, 3, 0))
    cache, expected, by_hand = cache_of(codec), cache_of(codec), cache_of(plain)
    KERNEL.store(k, v, cache, inputs)
    REFERENCE.store(k, v, expected, inputs)
    assert torch.equal(cache.pages, expected.pages)
    assert torch.equal(cache.recent.nan_to_num(7), expected.recent.nan_to_num(7))
    by_hand.pages.copy_(cache.pages)
    by_hand.recent.copy_(cache.recent)
    queries = codec.key_transform.apply(codec.prepare_queries(q))
    found = KERNEL.attend(q, cache, inputs, SCALE)
    assert torch.equal(found, codec.value_transform.invert(KERNEL.attend(queries, by_hand, inputs, SCALE)))
    assert KERNEL.attend(q.bfloat16(), cache, inputs, SCALE).dtype == torch.bfloat16


def test_pages_longer_than_a_block_and_heads_of_128_channels() -> None:
    """Bugs: the second block of a page read from its beginning; parameters of one group taken for all."""
    packed = row_codec(4.0, 128, 64, 1, seed=5), row_codec(2.0, 128, 64, 1, seed=6)
    codec = LayerCodec(packed[0], packed[1], Identity(), Identity(), window=17, num_sinks=4)
    cache, kernel = empty_cache(codec, (3, 64, 14)), QuantizedTriton(split=128, block=32)
    cache.pages.fill_(0x7F)
    cache.recent.fill_(torch.nan)
    rows = (2 * random_tokens(148, 4, 128, 4), random_tokens(148, 1, 128, 1), random_tokens(148, 1, 128, 1))
    recent = {page: 13 - page for page in range(10)}
    for start, stop, by in ((0, 143, REFERENCE), (143, 148, kernel)):
        stored = build_batch([BatchRow([0] * (stop - start), start, [2, 0, 1], 64, 0, recent)]).attention
        by.store(rows[1][start:stop], rows[2][start:stop], cache, stored)
    expected, bound = exact(rows, cache, 2)
    last = build_batch([BatchRow([0, 0], 146, [2, 0, 1], 64, 0, recent)]).attention
    assert_within(kernel.attend(rows[0][-2:], cache, last, SCALE), expected, bound)


@pytest.mark.parametrize(
    ("bits", "head_dim", "group_size"),
    [((4.0, 2.0), 64, 32), ((2.0, 4.0), 64, 64), ((4.0, 4.0), 128, 32), ((2.0, 2.0), 128, 16)],
)
@pytest.mark.parametrize(("window", "num_sinks"), [(5, 3), (0, 0)])
def test_decode_steps(bits: tuple[float, float], head_dim: int, group_size: int, window: int, num_sinks: int) -> None:
    """Groups of several planes, of a whole one, and of a part of one; blocks before, among and after those that every
    row sees whole. Bugs: channels of a group in another order than the queries', a token's parameters beside it."""
    packed = [row_codec(width, head_dim, group_size, 1, seed=5 + i) for i, width in enumerate(bits)]
    codec = LayerCodec(packed[0], packed[1], Identity(), Identity(), window, num_sinks)
    cache = empty_cache(codec, (4, 32, 8))
    cache.pages.fill_(0x7F)
    cache.recent.fill_(torch.nan)
    rows = (random_tokens(103, 3, head_dim, 3), random_tokens(103, 1, head_dim, 1), random_tokens(103, 1, head_dim, 2))
    recent, table = {page: 7 - page for page in range(7)}, [2, 0, 3, 1]
    stored = build_batch([BatchRow([0] * 103, 0, table, 32, 0, recent)]).attention
    REFERENCE.store(rows[1], rows[2], cache, stored)
    expected, bound = exact(rows, cache, 2)
    last = build_batch([BatchRow([0, 0], 101, table, 32, 0, recent)]).attention
    assert_within(QuantizedTriton(64, 32).attend(rows[0][-2:], cache, last, SCALE), expected, bound)


def test_rows_that_no_recent_page_is_held_for() -> None:
    """Bug: a token that is kept packed alone, written to recent page 0 or over the last one."""
    codec = codec_of((4.0, 4.0), window=0, num_sinks=14)
    _, k, v = tokens(20, seed=9)
    inputs, caches = inputs_of(codec, (0, 20, 0)), [cache_of(codec), cache_of(codec)]
    assert inputs.recent is not None
    assert bool((inputs.recent.slots < 0).any())
    kernels: tuple[QuantizedKernel, ...] = (KERNEL, REFERENCE)
    for kernel, cache in zip(kernels, caches, strict=True):
        kernel.store(k, v, cache, inputs)
    assert torch.equal(caches[0].recent.nan_to_num(7), caches[1].recent.nan_to_num(7))


def test_a_nan_shows_and_stays_with_its_head() -> None:
    """Bug: a broken model that looks well, because a comparison dropped the NaN on its way to the page or back."""
    codec = codec_of((4.0, 4.0), window=2, num_sinks=0)
    cache, (q, k, v) = cache_of(codec), tokens(4, seed=10)
    v[1, 0, 3] = torch.nan
    KERNEL.store(k, v, cache, inputs_of(codec, (0, 4, 0)))
    for i, is_broken in ((0, False), (1, True), (3, True)):  # in high precision at first, from the page later
        found = KERNEL.attend(q[i : i + 1], cache, inputs_of(codec, (i, 1, 0)), SCALE)
        assert bool(found[:, :2].isnan().any()) == is_broken
        assert bool(found[:, 2:].isfinite().all())


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 10), (7, 1, 24), (20, 1, 64)])
def test_pages_of_float16(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Bugs: channels beyond the head's own, heads that take another group's keys, the last page read past its end."""
    length, table = 37, [4, 0, 2]
    q, k, v = (random_tokens(length, n, head_dim, n) for n in (num_heads, num_kv_heads, num_kv_heads))
    pages = torch.full((5, *page_shape(num_kv_heads, 16, head_dim)), torch.nan, dtype=torch.float16)
    F16Reference().store(k, v, pages, plain_inputs((0, length, table)))
    keys, values = (
        x.half().double().repeat_interleave(num_heads // num_kv_heads, dim=1).transpose(0, 1)[:, None] for x in (k, v)
    )  # [heads, 1, j, D]
    shape = (num_heads, 3, length, head_dim)
    expected, bound = exact_attention(q[-3:], keys.expand(shape), values.expand(shape), 0.0)
    found = PLAIN.attend(q[-3:], pages, plain_inputs((34, 3, table)), SCALE)
    assert_within(found, expected, bound)
    together = plain_inputs((10, 11, table), (36, 1, table))
    rows = PLAIN.attend(torch.cat((q[10:21], q[36:])), pages, together, SCALE)
    assert_within(rows[-1:], expected[-1:], bound[-1:])
    first = keys[:, :, :21].expand(num_heads, 11, 21, head_dim), values[:, :, :21].expand(num_heads, 11, 21, head_dim)
    assert_within(rows[:-1], *exact_attention(q[10:21], *first, 0.0))


@pytest.mark.parametrize("fixed", [False, True])
def test_more_parts_than_are_added_up_at_once(fixed: bool) -> None:
    """Bugs: parts beyond those in use, which nobody wrote; a highest score that a later part does not know of."""
    generator, used = torch.Generator().manual_seed(12), [37, 5]
    sums, totals, highest = (torch.rand(2, 2, 40, n, generator=generator) + 0.5 for n in (10, 1, 1))
    highest = 4 * highest.cumsum(2)
    inside = torch.arange(40)[:, None] < torch.tensor(used)[:, None, None, None]
    stats = torch.cat((highest, totals), dim=-1).masked_fill(~inside, torch.nan)
    rows = torch.tensor([[1, used[0]], [0, used[1]]], dtype=torch.int32)
    launch = Launch(send([rows, rows], torch.device("cpu")), 40, False)
    result = torch.zeros(2, 2, 10)
    merge(sums.masked_fill(~inside, torch.nan), stats, launch, result, fixed)
    weights = torch.exp2(highest.double() - 60) * inside
    expected = (sums * weights).sum(2) / (totals * weights).sum(2)
    assert_within(result.flip(0), expected, 8 * EPS * max(used) * expected)


def test_a_row_of_a_chunk_of_float16_pages() -> None:
    """Of "triton-fixed" rows of a prompt have one part, a decode row one for each split; activations of bfloat16 come
    back as such, cut off by the interpreter where a GPU rounds."""
    q, k, v = (random_tokens(41, n, 16, n) for n in (8, 2, 2))
    pages = torch.full((5, *page_shape(2, 16, 16)), torch.nan, dtype=torch.float16)
    F16Reference().store(k, v, pages, plain_inputs((0, 41, [1, 3, 0])))
    half = FIXED_PLAIN.attend(q[30:].bfloat16(), pages, plain_inputs((30, 11, [1, 3, 0])), SCALE)
    whole = FIXED_PLAIN.attend(q[30:].bfloat16().float(), pages, plain_inputs((30, 11, [1, 3, 0])), SCALE)
    one = FIXED_PLAIN.attend(q[36:37].bfloat16().float(), pages, plain_inputs((36, 1, [1, 3, 0])), SCALE)
    assert torch.equal(whole[6], one[0])
    assert half.dtype == torch.bfloat16
    assert_within(half, whole, torch.finfo(torch.bfloat16).eps * whole.abs())


def test_store_of_float16_pages() -> None:
    """Bugs: an infinity that is kept, a byte of a page that another sequence shares."""
    k, v = random_tokens(4, 2, 10, 1), random_tokens(4, 2, 10, 2)
    k[3, 0, 1], v[1, 0, 2] = 1e5, -torch.inf
    caches = [torch.full((4, *page_shape(2, 16, 10)), torch.nan, dtype=torch.float16) for _ in range(2)]
    kernels: tuple[AttentionKernel, ...] = (PLAIN, F16Reference())
    for kernel, pages in zip(kernels, caches, strict=True):
        kernel.store(k, v, pages, plain_inputs((14, 4, [2, 1])))
    assert torch.equal(caches[0].view(torch.int16), caches[1].view(torch.int16))
