"""Bytes of a page, and the tensors under it."""

import pytest
import torch

from kvcache.layout import PageLayout
from kvcache.manager import PageCopy
from kvcache.policy import PolicyError, read_policy
from kvcache.storage import PageStorage


def layout_of(policy: str = "f16") -> PageLayout:
    return PageLayout(read_policy(policy), num_layers=2, num_kv_heads=3, head_dim=8, page_size=16)


@pytest.mark.parametrize("policy", ["f16", "f32"])
def test_bytes_are_those_of_the_tensors(policy: str) -> None:
    """Bug: a byte count that forgets layers, or values beside keys, promises more tokens than memory holds."""
    layout = layout_of(policy)
    storage = PageStorage(layout, num_pages=5, device=torch.device("cpu"))
    allocated = sum(pages.numel() * pages.element_size() for pages in storage.layers)
    assert allocated == 5 * layout.bytes_per_page == 5 * 16 * layout.bytes_per_token


def test_copy_touches_only_the_target() -> None:
    storage = PageStorage(layout_of(), num_pages=3, device=torch.device("cpu"))
    for pages in storage.layers:
        pages.copy_(torch.arange(3).view(3, 1, 1, 1, 1).expand(pages.shape))
    storage.copy([PageCopy(source=2, target=0)])
    for pages in storage.layers:
        assert [float(page.mean()) for page in pages] == [2, 1, 2]


def test_llama_3_8b_needs_what_the_paper_says() -> None:
    """131,072 bytes for a token of an f16 cache: 32 layers, 8 heads of 128, keys and values."""
    assert PageLayout(read_policy("f16"), 32, 8, 128, 64).bytes_per_token == 131_072


def test_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r"q9.*f16"):
        read_policy("q9")


def quantized(policy: str, num_layers: int = 32, head_dim: int = 128, page_size: int = 64) -> PageLayout:
    return PageLayout(read_policy(policy), num_layers, 8, head_dim, page_size)


@pytest.mark.parametrize(
    ("policy", "num_bytes", "bits"),
    [
        ("k8v8", 69_632, 8.5),
        ("k4v4", 34_816, 4.25),
        ("k4v2", 26_624, 3.25),
        ("k2v2", 18_432, 2.25),
        ("k2v1.5", 16_896, 2.0625),
    ],
)
def test_llama_3_8b_with_quantized_pages(policy: str, num_bytes: int, bits: float) -> None:
    """Bug: a byte count that leaves out scales and zeros, and so the memory they take."""
    layout = quantized(policy)
    assert layout.bytes_per_token == num_bytes
    assert layout.effective_bits == bits
    assert layout.bytes_per_page == 64 * num_bytes


@pytest.mark.parametrize("policy", ["k4v4", "k3v1.5:g16", "skvq:k2v2:s16/0=f16", "k16v2/-1=k4v4"])
@pytest.mark.parametrize("page_size", [16, 32])
def test_bytes_are_those_of_the_quantized_tensors(policy: str, page_size: int) -> None:
    layout = quantized(policy, num_layers=3, head_dim=64, page_size=page_size)
    pages = recent = 0
    for layer in PageStorage(layout, 3, torch.device("cpu"), num_recent_pages=5).layers:
        pages += layer.nbytes if isinstance(layer, torch.Tensor) else layer.pages.nbytes
        recent += 0 if isinstance(layer, torch.Tensor) else layer.recent.nbytes
    assert (pages, recent) == (3 * layout.bytes_per_page, 5 * layout.bytes_per_recent_page)


def test_copies_of_recent_pages_leave_the_others_alone() -> None:
    """Bug: a fork that copies the started page over another sequence's window, or the window over a page."""
    storage = PageStorage(quantized("k4v4/0=f16", num_layers=2, head_dim=64), 3, torch.device("cpu"), 4)
    plain, packed = storage.layers
    tensors = (plain, packed.pages, packed.recent)
    for tensor in tensors:
        tensor.copy_(torch.arange(len(tensor)).view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape))
    storage.copy([PageCopy(3, 1, is_recent=True), PageCopy(2, 0)])
    for tensor, expected in zip(tensors, ([2, 1, 2], [2, 1, 2], [0, 3, 2, 3]), strict=True):
        assert [float(page.float().mean()) for page in tensor] == expected


def test_short_sequences_save_nothing() -> None:
    """The window of 128 tokens and 4 sinks take 21 MB on that model; the saving must first make up for them."""
    layout = quantized("k2v2")
    assert layout.bytes_per_recent_page == 16 * 131_072
    beside = layout.recent_bytes_per_sequence
    assert beside == (9 + 1) * 16 * 131_072  # 128 tokens in pages of 16 touch up to nine
    n = layout.break_even_tokens
    assert (n - 1) * 18_432 + beside > (n - 1) * 131_072
    assert n * 18_432 + beside <= n * 131_072


@pytest.mark.parametrize("policy", ["f16", "k4v4:w0:s0", "k4v4/0=f16/1=f16"])
def test_nothing_is_kept_that_nobody_reads(policy: str) -> None:
    """Bug: a window for a cache whose layers are all in floating point."""
    layout = quantized(policy, num_layers=2)
    assert layout.read_rule is None
    assert (layout.recent_bytes_per_sequence, layout.break_even_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("policy", "page_size", "message"),
    [
        ("k4v4", 48, "pages of 48 tokens are not one of 16, 32, 64, 128"),
        ("k4v4:g48", 64, "groups of 48"),
    ],
)
def test_pages_that_cannot_be_are_refused(policy: str, page_size: int, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        quantized(policy, page_size=page_size)
