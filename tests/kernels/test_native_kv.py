"""The quantized cache in C++: the reference's bytes, float64's attention, the same bits whatever is beside."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from kernels import native
from kernels.attention.f16.layout import keys_of, values_of
from kernels.attention.quantized.cache import LayerCodec, QuantizedSpec, page_views
from kernels.attention.quantized.layout import RECENT_TOKENS, WIDTHS, ChunkLayout
from kernels.attention.quantized.transforms import Hadamard, HeadTransform, Identity, Permutation
from kernels.contract import AttentionInputs
from tests.kernels.attention_oracle import random_tokens
from tests.kernels.kv_oracle import cache_of, row_codec
from tests.tolerance import EPS, assert_within

if native.MISSING is not None:
    pytest.skip(native.MISSING, allow_module_level=True)

from kernels.attention.quantized.native import QuantizedNative, query_levels, weight_levels
from kernels.attention.quantized.reference import QuantizedReference
from kernels.native import _native

SPLIT, BLOCK = 512, 64  # tokens, kernels/native/{attention,quantized}.hpp
SCALE = 0.3
KERNEL, REFERENCE = QuantizedNative(), QuantizedReference()
every_isa = pytest.mark.parametrize("isa", _native.supported_isas())


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
            (2 * torch.randperm(n, generator=torch.Generator().manual_seed(n))).tolist()
            for n in (num_pages, num_recent)
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
    1 / its levels of the largest of its group, so a score by that times sum |k|; and a weight times a scale by half of
    1 / its levels of the largest of BLOCK tokens, which multiplies at most half of max_code.
    """
    packed, high = read_pages(world, length)
    at, positions = torch.arange(length), torch.arange(start, length)[:, None]
    is_high = (at < world.codec.num_sinks) | (positions - at < world.codec.window)  # [rows, n]
    visible = at <= positions
    results, bounds, keys = [], [], world.codec.keys.layout
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
        peaks = largest_of_groups(q, keys.group_size)
        step = 1.01 / query_levels(keys.bits) if keys.num_groups else 0.0
        digit_error = step / 2 * (peaks[:, None] * k.abs() * is_packed).sum(-1)
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
    grouped = x.abs().reshape(*x.shape[:-1], -1, group_size)
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
    padded = torch.nn.functional.pad(weights, (0, -length % BLOCK))
    blocks = padded.reshape(len(weights), -1, BLOCK, 1)
    read = torch.nn.functional.pad(scales, (0, 0, 0, -length % BLOCK))
    read = read.reshape(-1, BLOCK, scales.shape[1]) * (blocks > 0)
    peaks = blocks.amax(2) * read.amax(2)  # [rows, blocks, num_groups]
    error = 1.01 / weight_levels(layout.bits) / 2 * layout.max_code / 2 * (peaks * (blocks > 0).sum(2)).sum(1)
    products = weights[:, :, None] * (scales * layout.max_code + zeros.abs())
    error += 4 * EPS * math.sqrt(length) * products.norm(dim=1) + 8 * EPS * products.sum(1)  # terms may cancel
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


@every_isa
@pytest.mark.parametrize("high", [(0, 0), (1, 0), (128, 4), (100, 33), (512, 64)], ids=str)
def test_precision_at_the_edges_of_windows_and_splits(isa: str, high: tuple[int, int]) -> None:
    """Bugs: a window one token too long or short, sinks that are lost, a part of a block weighed as a whole."""
    _native.use_isa(isa)
    world = World(codec_of((4.0, 4.0), high=high), SPLIT + 130, 32)
    for length in (1, 16, 33, BLOCK + 1, 101, 128, 129, 165, 192, 193, SPLIT, SPLIT + 1, SPLIT + 129, SPLIT + 130):
        start = max(0, length - 3)
        world.cache.pages.fill_(0x7F)
        world.cache.recent.fill_(torch.nan)
        for at in (0, start):  # what the last step reads in high precision may have been stored by one before
            world.store(at, length)
        expected, bound = exact_attention(world, start, length)
        assert_within(world.attend(start, length), expected, bound, f"attention over {length} tokens")


@pytest.mark.parametrize("bits", [(8.0, 4.0), (2.0, 1.5), (16.0, 3.0), (4.0, 16.0)], ids=str)
@pytest.mark.parametrize("size", [1, 5, 16, 64])
def test_chunks_of_a_prompt_do_not_change_it(bits: tuple[float, float], size: int) -> None:
    """Bitwise, each chunk attending before the next is stored, over two edges of splits."""
    num_tokens = 2 * SPLIT + 20 if size > 1 else SPLIT + 20
    whole, world = (World(codec_of(bits, high=(70, 5)), num_tokens, 64) for _ in range(2))
    assert torch.equal(world.chunks(size), whole.step(0, num_tokens))
    assert torch.equal(world.cache.pages, whole.cache.pages)


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    """Prefill over several splits, a few rows and one row; each kernel of each width."""
    num_tokens = 2 * SPLIT + 7
    for bits, sizes in (((8.0, 2.0), (64, 32)), ((3.0, 4.0), (32, 32)), ((1.5, 8.0), (32, 16)), ((2.0, 3.0), (32, 16))):
        world = World(codec_of(bits, sizes, turn=Hadamard()), num_tokens, 32, num_heads=14)
        world.store(0, num_tokens)
        for start in (num_tokens - 40, num_tokens - 5, num_tokens - 1):
            results = []
            for isa in _native.supported_isas():
                for num_threads in (1, 2):
                    _native.use_isa(isa)
                    _native.set_num_threads(num_threads)
                    results.append(world.attend(start, num_tokens))
            assert all(torch.equal(result, results[0]) for result in results)


@every_isa
def test_page_sizes_give_the_same_bits(isa: str) -> None:
    _native.use_isa(isa)
    results = [World(codec_of((4.0, 2.0)), SPLIT + 50, size).step(0, SPLIT + 50) for size in (16, 32, 64, 128)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_neighbours_do_not_change_a_sequence() -> None:
    """Bitwise: a decode step alone, and between a prompt and a sequence of another length."""
    world = World(codec_of((4.0, 2.0), high=(SPLIT + 50, 4)), SPLIT + 30)
    world.store(0, SPLIT + 30)
    rows = [world.row(*span) for span in ((60, 100), (SPLIT + 29, SPLIT + 30), (4, 7))]
    starts = (0, 40, 41, 44)
    q = random_tokens(44, 4, 32, 9)
    together = KERNEL.attend(q, world.cache, build_batch(rows).attention, SCALE)
    for row, (start, stop) in zip(rows, pairwise(starts), strict=True):
        alone = KERNEL.attend(q[start:stop], world.cache, build_batch([row]).attention, SCALE)
        assert torch.equal(together[start:stop], alone)


@every_isa
@pytest.mark.parametrize("bits", [(4.0, 4.0), (8.0, 16.0), (16.0, 1.5)], ids=str)
def test_later_tokens_cannot_reach_a_row(isa: str, bits: tuple[float, float]) -> None:
    """Bugs: NaN that is weighed with zero; a block's largest scale that is a later token's."""
    _native.use_isa(isa)
    for high in ((20, 4), (0, 0)):
        world = World(codec_of(bits, high=high), 150, 32)
        expected = world.step(0, 150)
        for position in (0, 17, 130):
            for byte, garbage in ((0x7F, torch.nan), (0x35, 1e4)):
                world.cache.pages.fill_(byte)
                world.cache.recent.fill_(garbage)
                world.store(0, position + 1)
                for start in (0, position):
                    world.store(start, position + 1)
                    found = world.attend(start, position + 1)
                    assert torch.equal(found, expected[start : position + 1])
                rest = torch.full_like(world.k[position + 1 :], garbage)
                world.store(0, position + 1)
                KERNEL.store(rest, rest, world.cache, world.inputs(position + 1, 150))
                world.cache.recent[world.recent[(position + 1) // RECENT_TOKENS]] = garbage
                world.store(0, position + 1)
                assert torch.equal(world.attend(0, 150)[: position + 1], expected[: position + 1])


@every_isa
@pytest.mark.parametrize("bits", [(bits, bits) for bits in WIDTHS], ids=str)
@pytest.mark.parametrize("turn", ["as they are", "turned", "sorted"])
def test_store_writes_what_the_reference_writes(isa: str, bits: tuple[float, float], turn: str) -> None:
    """Bitwise: codes, scales, zeros, recent pages, for ties, huge ranges, groups of one value, infinities and NaN."""
    _native.use_isa(isa)
    for sizes, page_size in (((32, 16), 16), ((96, 48), 64), ((128, 128), 32)):
        sort = Permutation(torch.stack([torch.arange(sizes[0]).roll(3), torch.arange(sizes[0]).flip(0)]))
        turns: dict[str, HeadTransform] = {"as they are": Identity(), "turned": Hadamard(), "sorted": sort}
        world = World(codec_of(bits, sizes, high=(40, 4), turn=turns[turn]), 40, page_size)
        world.v *= 1e-3
        for x in (world.k, world.v):
            x[3], x[4], x[5] = 0.25, torch.round(x[4] * 4), x[5] * 1e5
            x[6], x[7, 0, 3], x[8, 1, 1], x[9, 0, 20] = 0, torch.inf, torch.nan, -1e30
        expected = replace(world.cache, pages=world.cache.pages.clone(), recent=world.cache.recent.clone())
        world.store(0, 40)
        REFERENCE.store(world.k, world.v, expected, world.inputs(0, 40))
        assert torch.equal(world.cache.pages, expected.pages)
        same = (world.cache.recent == expected.recent) | (world.cache.recent.isnan() & expected.recent.isnan())
        assert bool(same.all())


@every_isa
def test_transforms(isa: str) -> None:
    """Bugs: queries that are not turned, an output turned back by the keys' way."""
    _native.use_isa(isa)
    order = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    plain = World(codec_of((4.0, 4.0), (96, 48)), 60)
    for keys, values in ((Hadamard(), Permutation(order)), (Permutation(order), Hadamard())):
        turned = World(replace(plain.codec, key_transform=keys, value_transform=values), 60)
        found = turned.step(0, 60)
        plain.q, plain.k, plain.v = keys.apply(turned.q), keys.apply(turned.k), values.apply(turned.v)
        assert torch.equal(found, values.invert(plain.step(0, 60)))


def test_a_layer_with_another_codec_is_another_layer() -> None:
    """Bug: what was prepared for the old codec, whose tensors may be gone, serves the new one."""
    world, other = (World(codec_of((4.0, 4.0), turn=turn), 60) for turn in (Identity(), Hadamard()))
    world.step(0, 60)
    world.cache = replace(world.cache, codec=other.codec)
    assert torch.equal(world.step(0, 60), other.step(0, 60))


def test_nan_shows_and_infinities_saturate() -> None:
    """Bugs: a NaN whose digits are numbers; a NaN of a query that its sums lose."""
    for bits in ((4.0, 4.0), (8.0, 8.0), (16.0, 2.0)):
        for x in ("q", "k", "v"):
            world = World(codec_of(bits, high=(5, 2)), 80)
            getattr(world, x)[10, 0, 3] = torch.inf
            getattr(world, x)[11, 0, 3] = torch.nan
            result = world.step(0, 80)
            assert bool(result[:10].isfinite().all())
            assert bool(result[:, 2:].isfinite().all())  # another kv head
            assert bool(result[11, 0, 3].isnan())
            if x != "q":
                assert bool(result[11:, :2, 3].isnan().all())
                assert bool(result[10].isfinite().all())


@pytest.mark.parametrize(
    ("bits", "head_dim", "group_size", "change", "reason"),
    [
        (4.0, 40, 40, {}, "head_dim 40 is not a multiple of 16"),
        (8.0, 64, 8, {}, r"groups of 8 channels \(keys\) are not a multiple of 16"),
        (4.0, 64, 32, {"dtype": torch.bfloat16}, "float32 activations"),
        (4.0, 64, 32, {"device": torch.device("meta")}, "not on meta"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(
    bits: float, head_dim: int, group_size: int, change: dict[str, object], reason: str
) -> None:
    codec = row_codec(bits, head_dim, group_size, 2)
    spec = QuantizedSpec(4, 2, ChunkLayout(codec.layout, codec.layout, 16), torch.device("cpu"), torch.float32)
    assert re.search(reason, KERNEL.refuses(replace(spec, **change)) or "")  # type: ignore[arg-type]


def test_bad_input_is_an_error_and_not_a_stray_write() -> None:
    world = World(codec_of((4.0, 4.0)), 20)
    world.store(0, 20)
    row = world.row(19, 20)
    with pytest.raises(ValueError, match="page 99 does not exist"):
        KERNEL.attend(world.q[:1], world.cache, build_batch([replace(row, block_table=[0, 99])]).attention, SCALE)
    with pytest.raises(ValueError, match=r"positions \[.*19\] are read in high precision and have no recent page"):
        KERNEL.attend(world.q[:1], world.cache, build_batch([replace(row, recent_table={0: 0})]).attention, SCALE)
    with pytest.raises(ValueError, match="the step has no recent pages"):
        KERNEL.attend(world.q[:1], world.cache, build_batch([replace(row, recent_table={})]).attention, SCALE)
    with pytest.raises(ValueError, match="recent page 77 does not exist"):
        KERNEL.attend(
            world.q[:1], world.cache, build_batch([replace(row, recent_table={0: 77, 1: 0})]).attention, SCALE
        )
    with pytest.raises(ValueError, match="float32"):
        KERNEL.attend(world.q[:1].double(), world.cache, world.inputs(19, 20), SCALE)
    with pytest.raises(ValueError, match="rows"):
        KERNEL.store(world.k[:2], world.v[:2], world.cache, world.inputs(19, 20))
