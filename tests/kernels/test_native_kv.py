"""The quantized cache in C++: the reference's bytes, float64's attention, and the same bits whatever is computed beside."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from kernels import native
from kernels.attention.f16.layout import keys_of, values_of
from kernels.attention.quantized.cache import LayerCodec, QuantizedCache, QuantizedSpec, page_views
from kernels.attention.quantized.layout import RECENT_TOKENS, WIDTHS, ChunkLayout
from kernels.attention.quantized.transforms import Hadamard, HeadTransform, Identity, Permutation
from kernels.contract import AttentionInputs
from tests.kernels.attention_oracle import random_tokens
from tests.kernels.kv_oracle import cache_of, row_codec
from tests.tolerance import EPS, assert_within

if native.MISSING is not None:
    pytest.skip(native.MISSING, allow_module_level=True)

from kernels.attention.quantized.native import DIGITS, QuantizedNative
from kernels.attention.quantized.reference import QuantizedReference
from kernels.native import _native

SPLIT, BLOCK = 512, 64  # tokens, kernels/native/{attention,quantized}.hpp
SCALE = 0.3
KERNEL, REFERENCE = QuantizedNative(), QuantizedReference()
every_isa = pytest.mark.parametrize("isa", _native.supported_isas())


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    isa, num_threads = _native.isa(), _native.num_threads()
    yield
    _native.use_isa(isa)
    _native.set_num_threads(num_threads)


def codec_of(
    bits: tuple[float, float],
    sizes: tuple[int, int] = (32, 16),
    high: tuple[int, int] = (20, 4),
    turn: HeadTransform | None = None,
) -> LayerCodec:
    """Two kv heads. sizes: channels of a head and of a group; high: window and sinks."""
    keys, values = (row_codec(width, *sizes, 2, seed=7 + i) for i, width in enumerate(bits))
    turn = turn or Identity()
    return LayerCodec(keys, values, turn, turn, *high)


class World:
    """One sequence, four heads over two, in pages and recent pages of a shuffled order that decode to NaN at first."""

    def __init__(self, codec: LayerCodec, num_tokens: int, page_size: int = 16, num_heads: int = 4) -> None:
        self.codec, self.page_size = codec, page_size
        head_dim = codec.keys.layout.head_dim
        self.q = 2 * random_tokens(num_tokens, num_heads, head_dim, 1)
        self.k, self.v = (random_tokens(num_tokens, 2, head_dim, seed) for seed in (2, 3))
        num_pages, num_recent = -(-num_tokens // page_size), -(-num_tokens // RECENT_TOKENS)
        self.table, self.recent = (
            (2 * torch.randperm(n, generator=torch.Generator().manual_seed(n))).tolist() for n in (num_pages, num_recent)
        )
        self.cache = cache_of(codec, (2 * num_pages, page_size, 2 * num_recent))
        self.cache.pages.fill_(0x7F)
        self.cache.recent.fill_(torch.nan)

    def row(self, start: int, stop: int) -> BatchRow:
        window, sinks = self.codec.window, self.codec.num_sinks
        read = [j for j in range(stop) if j < sinks or (window > 0 and j > start - window)]
        recent = {j // RECENT_TOKENS: self.recent[j // RECENT_TOKENS] for j in read}
        return BatchRow([0] * (stop - start), start, self.table, self.page_size, 0, recent)

    def inputs(self, start: int, stop: int) -> AttentionInputs:
        return build_batch([self.row(start, stop)]).attention

    def store(self, start: int, stop: int) -> None:
        KERNEL.store(self.k[start:stop], self.v[start:stop], self.cache, self.inputs(start, stop))

    def attend(self, start: int, stop: int) -> Tensor:
        return KERNEL.attend(self.q[start:stop], self.cache, self.inputs(start, stop), SCALE)

    def step(self, start: int, stop: int) -> Tensor:
        self.store(start, stop)
        return self.attend(start, stop)

    def chunks(self, size: int) -> Tensor:
        length = len(self.q)
        return torch.cat([self.step(i, min(i + size, length)) for i in range(0, length, size)])


def read_pages(world: World, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """What lies in the pages: keys and values packed, and in high precision, [n, kv_heads, D] float64."""
    at = torch.arange(length)
    pages, rows = torch.tensor(world.table)[at // world.page_size], at % world.page_size
    packed = []
    codecs = (world.codec.keys, world.codec.values)
    for codec, views in zip(codecs, page_views(world.cache.pages, world.cache.layout), strict=True):
        bytes_, parameters = (part.transpose(1, 2)[pages, rows] for part in views.read())
        packed.append(codec.decode(bytes_, parameters).double())
    pages, rows = torch.tensor(world.recent)[at // RECENT_TOKENS], at % RECENT_TOKENS
    recent = world.cache.recent
    high = [keys_of(recent)[pages, :, :, rows].double(), values_of(recent)[pages, :, rows].double()]
    return packed, high


def exact_attention(world: World, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows start..length - 1 in float64 under the read rule, and a bound on the kernel; transforms left out.

    Beside float32's own error (tests/kernels/test_attention.py), the kernel rounds a query's channel by at most half of
    1 / DIGITS of the largest of its group, so a score by that times sum |k|, and a weight times a scale likewise within
    BLOCK tokens: what a code of up to max_code multiplies.
    """
    packed, high = read_pages(world, length)
    at, positions = torch.arange(length), torch.arange(start, length)[:, None]
    is_high = (at < world.codec.num_sinks) | (positions - at < world.codec.window)  # [rows, n]
    visible = at <= positions
    results, bounds = [], []
    group = world.q.shape[1] // 2
    for h in range(world.q.shape[1]):
        q = world.q[start:length, h].double() * SCALE
        k, v = (
            torch.where(is_high[:, :, None], b[:, h // group], a[:, h // group])
            for a, b in zip(packed, high, strict=True)
        )  # [rows, n, D]
        k, v = (x.masked_fill(~visible[:, :, None], 0) for x in (k, v))
        terms = q[:, None] * k
        scores = terms.sum(-1)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)  # [rows, n]
        is_packed = (visible & ~is_high)[:, :, None]
        peaks = largest_of_groups(q, world.codec.keys.layout.group_size)
        digit_error = 0.51 / DIGITS * (peaks[:, None] * k.abs() * is_packed).sum(-1)
        if not world.codec.keys.layout.num_groups:
            digit_error = 0 * digit_error
        score_error = 4 * EPS * math.sqrt(q.shape[-1]) * terms.norm(dim=-1) + 2 * EPS * scores.abs() + digit_error
        worst = score_error.amax(-1, keepdim=True) + 4 * EPS * -(-length // SPLIT)
        mixed = 4 * EPS * math.sqrt(length) * (weights[:, :, None] * v).norm(dim=1)
        bound = 2 * worst * (weights[:, :, None] * v.abs()).sum(1) + mixed
        if world.codec.values.layout.num_groups:
            bound += weight_error(world, weights * is_packed[..., 0], h // group)
        results.append((weights[:, :, None] * v).sum(1))
        bounds.append(bound)
    return torch.stack(results, 1), torch.stack(bounds, 1)


def largest_of_groups(x: Tensor, group_size: int) -> Tensor:
    """x: [..., D] -> the same shape."""
    grouped = x.abs().unflatten(-1, (-1, group_size))
    return grouped.amax(-1, keepdim=True).expand(grouped.shape).flatten(-2)


def weight_error(world: World, weights: Tensor, kv_head: int) -> Tensor:
    """weights: [rows, n], zero where not packed -> what rounding them times scales can change, [rows, D]. And float32
    sums of codes and of zeros that may cancel."""
    layout, length = world.codec.values.layout, weights.shape[1]
    at = torch.arange(length)
    pages, rows = torch.tensor(world.table)[at // world.page_size], at % world.page_size
    stored = page_views(world.cache.pages, world.cache.layout)[1].parameters.transpose(1, 2)[pages, rows, kv_head]
    both = stored.contiguous().view(layout.parameter_dtype).squeeze(-1).double()  # [n, 2 num_groups]
    both = both * float(world.codec.values.prescale[kv_head])
    scales, zeros = both.chunk(2, -1)
    products = weights[:, :, None] * scales  # [rows, n, num_groups]
    padded = torch.nn.functional.pad(products, (0, 0, 0, -length % BLOCK))
    peaks = padded.unflatten(1, (-1, BLOCK)).amax(2)  # [rows, blocks, num_groups]
    counts = torch.nn.functional.pad((weights > 0).double(), (0, -length % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2)
    error = 0.51 / DIGITS * layout.max_code * (peaks * counts[:, :, None]).sum(1)
    error += 8 * EPS * ((products * layout.max_code).sum(1) + (weights[:, :, None] * zeros.abs()).sum(1))
    return error.repeat_interleave(layout.group_size, -1)


@every_isa
@pytest.mark.parametrize("bits", [(a, b) for a in WIDTHS for b in WIDTHS if a == b or 4.0 in (a, b)], ids=str)
def test_precision_of_every_width(isa: str, bits: tuple[float, float]) -> None:
    """Bugs: a shift, a plane or a group too far; a token dropped or read twice where a page or a vector ends."""
    _native.use_isa(isa)
    for sizes, page_size in (((32, 16), 16), ((64, 32), 64), ((128, 64), 32), ((160, 32), 16)):
        world = World(codec_of(bits, sizes), 70, page_size)
        world.store(0, 70)
        expected, bound = exact_attention(world, 66, 70)
        assert_within(world.attend(66, 70), expected, bound, f"heads of {sizes[0]}, groups of {sizes[1]}")
