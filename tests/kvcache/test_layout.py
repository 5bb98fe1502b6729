"""Bytes of a page, and the tensors under it."""

import pytest
import torch

from kvcache.layout import PageLayout
from kvcache.manager import PageCopy
from kvcache.policy import PolicyError, parse_policy
from kvcache.storage import PageStorage


def layout_of(policy: str = "f16") -> PageLayout:
    return PageLayout(parse_policy(policy), num_layers=2, num_kv_heads=3, head_dim=8, page_size=16)


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
    assert PageLayout(parse_policy("f16"), 32, 8, 128, 64).bytes_per_token == 131_072


def test_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r"q9.*f16"):
        parse_policy("q9")
