"""What the cache of a plan takes, beside one of float16."""

from typing import Any

import msgspec

from engine.inspection import cache_memory, sequence_memory
from kvcache.layout import PageLayout
from kvcache.policy import read_policy
from tests.fakes import PLAN


def layout_of(policy: str) -> PageLayout:
    """Of Llama-3-8B."""
    return PageLayout(read_policy(policy), num_layers=32, num_kv_heads=8, head_dim=128, page_size=64)


def test_short_sequences_are_made_of_their_window() -> None:
    """Bug: bits of a page given for a sequence that holds a window and sinks beside its pages."""
    layout = layout_of("k4v4")
    one = sequence_memory(layout, 1024)
    assert one.page_bytes == 1024 * 34_816
    assert one.recent_bytes == (8 + 1) * 2 * 2**20  # positions 897 to 1023 lie on 8 recent pages, the sinks on another
    assert one.f16_bytes == 1024 * 131_072
    assert one.bits == 8 * (one.page_bytes + one.recent_bytes) / (1024 * 65_536)
    assert sequence_memory(layout, 32_768).bits < 4.4 < one.bits < sequence_memory(layout, 200).bits
    even = layout.break_even_tokens
    assert sequence_memory(layout, 64 * (even // 64 - 1)).recent_bytes > 0
    below, above = (sequence_memory(layout, 64 * (even // 64 + i)) for i in (-1, 1))
    assert below.page_bytes + below.recent_bytes > below.f16_bytes
    assert above.page_bytes + above.recent_bytes < above.f16_bytes


def test_what_fits_is_counted_with_the_recent_pages() -> None:
    """Bug: a comparison with float16 in which the quantized side has memory that is not counted."""
    layout = layout_of("k2v2")
    bytes_of = {"bytes_per_page": layout.bytes_per_page, "bytes_per_recent_page": layout.bytes_per_recent_page}
    sizes: dict[str, Any] = {"page_size": 64, "num_pages": 100, "max_model_len": 5000, **bytes_of}
    plan = msgspec.structs.replace(PLAN, num_recent_pages=50, **sizes)
    kv = cache_memory(layout, plan)
    assert kv.num_bytes == 100 * 64 * 18_432 + 50 * 2 * 2**20
    assert kv.num_tokens == 6400
    assert kv.num_f16_tokens == kv.num_bytes // (64 * 131_072) * 64
    assert [one.num_tokens for one in kv.sequences] == [1024, 4096, 5000]
    assert kv.bits == 2.25
    sizes["bytes_per_page"] = layout_of("f16").bytes_per_page
    plain = cache_memory(layout_of("f16"), msgspec.structs.replace(PLAN, **sizes))
    assert (plain.bits, plain.num_f16_tokens, plain.break_even_tokens) == (16, 6400, 0)
    assert all(one.recent_bytes == 0 and one.page_bytes == one.f16_bytes for one in plain.sequences)
