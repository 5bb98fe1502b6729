"""Attention in C++: every instruction set against float64, and the same bits whatever is computed beside a row."""

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from kernels import native
from kernels.attention.f16.layout import page_shape
from kernels.contract import AttentionInputs, AttentionSpec
from tests.kernels.attention_oracle import exact_attention, random_tokens
from tests.tolerance import EPS, assert_within

if native.MISSING is not None:
    pytest.skip(native.MISSING, allow_module_level=True)

from kernels.attention.f16.native import PAGE_SIZES, F16Native
from kernels.attention.f16.reference import F16Reference
from kernels.native import _native

SPLIT = 512  # tokens, kernels/native/attention.hpp
SCALE = 0.3
KERNEL = F16Native()


class World:
    """One sequence's queries, keys and values, and pages of NaN to put them in, in shuffled order."""

    def __init__(
        self, num_tokens: int, heads: tuple[int, int, int], page_size: int = 64, dtype: torch.dtype = torch.float16
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.page_size = page_size
        self.q = random_tokens(num_tokens, self.num_heads, self.head_dim, 1)
        self.k = random_tokens(num_tokens, self.num_kv_heads, self.head_dim, 2)
        self.v = random_tokens(num_tokens, self.num_kv_heads, self.head_dim, 3)
        num_pages = -(-num_tokens // page_size)
        self.table = [
            2 * page for page in torch.randperm(num_pages, generator=torch.Generator().manual_seed(4)).tolist()
        ]
        shape = page_shape(self.num_kv_heads, page_size, self.head_dim)
        self.pages = torch.full((2 * num_pages, *shape), torch.nan, dtype=dtype)

    def inputs(self, start: int, stop: int) -> AttentionInputs:
        return build_batch([BatchRow([0] * (stop - start), start, self.table, self.page_size, 0)]).attention

    def store(self, start: int, stop: int) -> None:
        KERNEL.store(self.k[start:stop], self.v[start:stop], self.pages, self.inputs(start, stop))

    def attend(self, start: int, stop: int) -> Tensor:
        return KERNEL.attend(self.q[start:stop], self.pages, self.inputs(start, stop), SCALE)

    def whole(self) -> Tensor:
        num_tokens = self.q.shape[0]
        self.store(0, num_tokens)
        return self.attend(0, num_tokens)


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize(
    ("heads", "page_size", "dtype"),
    [
        ((4, 1, 64), 64, torch.float16),
        ((1, 1, 8), 16, torch.float16),
        ((14, 2, 40), 32, torch.float16),
        ((4, 4, 16), 128, torch.float16),
        ((4, 2, 128), 128, torch.float32),
        ((50, 1, 16), 16, torch.float32),
    ],
    ids=str,
)
def test_precision_at_the_edges_of_pages_and_splits(
    isa: str, heads: tuple[int, int, int], page_size: int, dtype: torch.dtype
) -> None:
    """Bug: a token dropped, or read twice, where a page, a vector of tokens or a split ends."""
    _native.use_isa(isa)
    world = World(2 * SPLIT + 3, heads, page_size, dtype)
    edges = [1, page_size - 1, page_size, page_size + 1, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 3]
    for length in edges:
        start = max(0, length - 3)
        world.pages.fill_(torch.nan)
        world.store(0, length)
        k, v = world.k[:length].to(dtype), world.v[:length].to(dtype)
        expected, bound = exact_attention(world.q[start:length], k, v, SCALE, num_parts=-(-length // SPLIT))
        assert_within(world.attend(start, length), expected, bound, f"attention over {length} tokens")


@pytest.mark.parametrize("heads", [(4, 1, 16), (7, 1, 8), (2, 2, 24)], ids=str)
@pytest.mark.parametrize("size", [1, 5, 16, 64])
def test_chunks_of_a_prompt_do_not_change_it(heads: tuple[int, int, int], size: int) -> None:
    """Bitwise, each chunk attending before the next is stored, over two edges of splits."""
    num_tokens = 2 * SPLIT + 20
    world = World(num_tokens, heads)
    expected = world.whole()
    world.pages.fill_(torch.nan)
    for start in range(0, num_tokens, size):
        stop = min(start + size, num_tokens)
        world.store(start, stop)
        assert torch.equal(world.attend(start, stop), expected[start:stop])


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    """Prefill over several splits, a few rows and one row: whole units, and units whose splits are shared."""
    world = World(3 * SPLIT + 7, (4, 2, 24))
    num_tokens = 3 * SPLIT + 7
    world.store(0, num_tokens)
    for start in (SPLIT, num_tokens - 5, num_tokens - 1):
        _native.set_num_threads(1)
        _native.use_isa(_native.supported_isas()[0])
        expected = world.attend(start, num_tokens)
        for isa in _native.supported_isas()[1 if start == SPLIT else 0 :]:
            for num_threads in (1, 2, 3):
                _native.use_isa(isa)
                _native.set_num_threads(num_threads)
                rows = slice(None) if start > SPLIT else slice(-64, None)
                assert torch.equal(world.attend(num_tokens - len(expected[rows]), num_tokens), expected[rows])


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_page_sizes_give_the_same_bits(isa: str) -> None:
    _native.use_isa(isa)
    results = [World(SPLIT + 50, (4, 2, 16), page_size).whole() for page_size in PAGE_SIZES]
    assert all(torch.equal(result, results[0]) for result in results)


def test_neighbours_do_not_change_a_sequence() -> None:
    """Bitwise: a decode step alone, and between a prompt and a sequence of another length."""
    world = World(SPLIT + 30, (4, 2, 16))
    world.whole()
    rows = [BatchRow([0] * n, stop - n, world.table, 64, 0) for n, stop in ((40, 100), (1, SPLIT + 30), (3, 7))]
    starts = (0, 40, 41, 44)
    q = random_tokens(44, 4, 16, 9)
    together = KERNEL.attend(q, world.pages, build_batch(rows).attention, SCALE)
    for row, start, stop in zip(rows, starts, starts[1:], strict=False):
        alone = KERNEL.attend(q[start:stop], world.pages, build_batch([row]).attention, SCALE)
        assert torch.equal(together[start:stop], alone)


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -65504.0])
def test_later_tokens_cannot_reach_a_row(isa: str, garbage: float) -> None:
    """Bug: what a row may not see is weighed with zero, and zero times NaN or infinity is NaN."""
    _native.use_isa(isa)
    for heads in ((4, 2, 16), (1, 1, 40)):
        world = World(150, heads, page_size=32)
        expected = world.whole()
        for position in (0, 17, 130):
            world.pages.fill_(garbage)
            world.store(0, position + 1)
            assert torch.equal(world.attend(position, position + 1), expected[position : position + 1])
            rest = torch.full_like(world.k[position + 1 :], garbage)
            inputs = world.inputs(position + 1, 150)
            KERNEL.store(rest, rest, world.pages, inputs)  # rows of one prompt beside each other
            assert torch.equal(world.attend(0, 150)[: position + 1], expected[: position + 1])


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_store_writes_what_the_reference_writes(isa: str, dtype: torch.dtype, num_tokens: int) -> None:
    """Bitwise: rounding, saturation and the places, for a few tokens and for enough to be shared by threads."""
    _native.use_isa(isa)
    _native.set_num_threads(2)
    world = World(num_tokens, (2, 2, 40), 16, dtype)
    for values in (world.k, world.v):
        values.view(-1)[:8] = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, 1e-6, 65519.0, 2.0**-25, -0.0])
    world.pages.zero_()
    expected = world.pages.clone()
    world.store(0, num_tokens)
    F16Reference().store(world.k, world.v, expected, world.inputs(0, num_tokens))
    as_bits = torch.int16 if dtype == torch.float16 else torch.int32
    assert torch.equal(world.pages.view(as_bits), expected.view(as_bits))


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_exp2_is_within_an_ulp(isa: str) -> None:
    """And the same bits in every instruction set; 1 at zero, tiny far below, NaN for NaN."""
    special = torch.tensor([0.0, -0.0, -0.5, -1.5, -125.0, -1e30, -torch.inf])
    x = torch.cat((special, -30 * torch.rand(100_001, generator=torch.Generator().manual_seed(1))))
    x = torch.cat((x, -(2.0 ** torch.linspace(-30, 6.9, 10_000))))

    def exp2(name: str, values: Tensor) -> Tensor:
        _native.use_isa(name)
        result = torch.empty_like(values)
        _native.exp2_negative(values.data_ptr(), result.data_ptr(), values.numel())
        return result

    y = exp2(isa, x)
    assert torch.equal(y, exp2(_native.supported_isas()[-1], x))
    assert_within(y, x.double().clamp(min=-125).exp2(), EPS * y.double(), "2^x")
    assert bool((y[:2] == 1).all())
    assert bool(exp2(isa, torch.tensor([torch.nan])).isnan().all())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 20}, "head_dim 20 is not a multiple of 8"),
        ({"page_size": 24}, "24 tokens"),
        ({"cache_dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": torch.bfloat16}, "float32 activations"),
        ({"device": torch.device("meta")}, "not on meta"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    spec = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16}
    kinds = {"device": torch.device("cpu"), "dtype": torch.float32, "cache_dtype": torch.float16}
    assert KERNEL.refuses(AttentionSpec(**spec, **kinds)) is None  # type: ignore[arg-type]
    assert reason in (KERNEL.refuses(AttentionSpec(**{**spec, **kinds, **change})) or "")  # type: ignore[arg-type]


def test_bad_input_is_an_error_and_not_a_stray_write() -> None:
    world = World(20, (4, 2, 16), page_size=16)
    world.whole()
    with pytest.raises(ValueError, match="page 99 does not exist"):
        KERNEL.attend(world.q[:1], world.pages, build_batch([BatchRow([0], 16, [0, 99], 16, 0)]).attention, SCALE)
    with pytest.raises(ValueError, match="3 heads are no multiple of 2 kv heads"):
        KERNEL.attend(torch.zeros(1, 3, 16), world.pages, world.inputs(19, 20), SCALE)
    with pytest.raises(ValueError, match="rows"):
        KERNEL.attend(world.q[:2], world.pages, world.inputs(19, 20), SCALE)
    with pytest.raises(ValueError, match="rows"):
        KERNEL.store(world.k[:2], world.v[:2], world.pages, world.inputs(19, 20))
