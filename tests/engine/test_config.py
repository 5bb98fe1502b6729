"""Every "auto" decided, every impossible wish refused by name."""

import math
from typing import Any

import msgspec
import pytest

from engine.config import ConfigError, EngineConfig, ModelFacts, Plan, resolve, size

FACTS = ModelFacts(
    max_position=4096,
    kv_bytes_per_token=1000,
    weight_bytes=2_000_000_000,
    free_memory=10_000_000_000,
    num_cores=2,
    has_cuda=False,
)


def plan_for(facts: ModelFacts = FACTS, **wishes: object) -> Plan:
    return resolve(EngineConfig("model", **wishes), facts)  # type: ignore[arg-type]


def test_a_byte_budget_becomes_whole_pages() -> None:
    assert plan_for(kv_memory=1_000_000).num_pages == 15  # 64,000 bytes a page
    assert plan_for(kv_memory=1_000_000, page_size=16).num_pages == 62


def test_cache_never_outgrows_what_all_seats_can_use() -> None:
    """Bug: a small model on a big machine takes half of its memory for pages no request can ever fill."""
    assert plan_for(max_num_seqs=2).num_pages == 2 * 64


def test_auto_takes_a_share_of_what_the_weights_leave() -> None:
    plan = plan_for(
        max_num_seqs=256, max_batch_tokens=256, facts=ModelFacts(4096, 100_000, 2 * 10**9, 10**10, 2, False)
    )
    assert 0 < plan.num_kv_tokens * 100_000 <= (10**10 - 2 * 10**9) * 0.5


def test_a_gpu_gives_most_of_what_the_weights_leave() -> None:
    """Bug: half of a GPU's memory, which nothing else would use, left idle."""
    facts = ModelFacts(4096, 100_000, 2 * 10**9, 10**10, 2, has_cuda=True, free_host_memory=10**9)
    num_bytes = plan_for(facts, device="cuda", max_num_seqs=256).num_kv_tokens * 100_000
    assert 0.8 * 7.7e9 < num_bytes < 0.9 * 7.7e9


WINDOWED = msgspec.structs.replace(FACTS, bytes_per_recent_page=10_000, recent_pages_per_sequence=10)


def test_the_budget_covers_windows_and_a_step_too() -> None:
    """Bug: recent pages on top of the memory that was asked for, or pages without the windows of who reads them."""
    plan = plan_for(WINDOWED, kv_memory=10_000_000, max_model_len=4096)
    bytes_taken = plan.num_pages * 64_000 + plan.num_recent_pages * 10_000
    assert 10_000_000 - 200_000 < bytes_taken <= 10_000_000
    num_seqs = math.ceil(plan.num_kv_tokens / 1024)  # 149 pages are more than nine such sequences
    assert plan.num_recent_pages == num_seqs * 10 + 512 // 16
    assert plan_for(WINDOWED, max_num_seqs=2).num_recent_pages == 2 * 10 + 512 // 16
    assert plan_for(kv_memory=10_000_000).num_recent_pages == 0


def test_a_budget_below_one_window_is_refused() -> None:
    """Bug: a cache of pages in which no sequence can run."""
    with pytest.raises(ConfigError, match=r"--kv-memory 390.6 KiB holds no page: raise it to 472.7 KiB or more"):
        plan_for(WINDOWED, kv_memory=400_000)
    assert plan_for(WINDOWED, kv_memory=484_000).num_pages == 1


def test_one_request_of_the_longest_window_always_fits() -> None:
    """Bug: a request that was let in and that no cache of this size can ever run."""
    facts = msgspec.structs.replace(WINDOWED, recent_pages_per_request=129, window=128)
    assert plan_for(facts, max_num_seqs=2, kv_request_window=2048).num_recent_pages == 129 + 512 // 16
    assert plan_for(facts, max_num_seqs=64, kv_request_window=2048).num_recent_pages == 64 * 10 + 512 // 16
    none_of_its_own = msgspec.structs.replace(facts, recent_pages_per_sequence=0, window=0)
    assert plan_for(none_of_its_own, kv_request_window=2048).num_recent_pages == 129 + 512 // 16
    for num_tokens, why in ((128, "nothing beyond the 128 tokens"), (4097, "exceeds the 4096 positions")):
        with pytest.raises(ConfigError, match=f"--kv-request-window {num_tokens} .*{why}"):
            plan_for(facts, kv_request_window=num_tokens)


def test_the_longest_prompt_always_fits_in_high_precision() -> None:
    """Bug: recent pages for the rows of one step where a whole prompt must stay."""
    facts = msgspec.structs.replace(WINDOWED, window=128)
    assert plan_for(facts, max_num_seqs=2, kv_prefill="exact").num_recent_pages == 2 * 10 + 4096 // 16
    assert plan_for(facts, max_num_seqs=2, kv_prefill="exact", max_model_len=900).num_recent_pages == 2 * 10 + 57
    assert plan_for(facts, max_num_seqs=2, kv_prefill="exact", max_model_len=300).num_recent_pages == 10 + 512 // 16
    none_of_its_own = msgspec.structs.replace(facts, recent_pages_per_sequence=0, window=0)
    assert plan_for(none_of_its_own, kv_prefill="exact").num_recent_pages == 4096 // 16
    with pytest.raises(ConfigError, match="--kv-prefill exact is for quantized caches"):
        plan_for(kv_prefill="exact")


def test_swap_space_is_no_memory_of_the_cache() -> None:
    """Bug: memory of a CPU promised to the cache and to the swap space; a GPU with less cache for the host's."""
    wishes: dict[str, Any] = {"swap_memory": 3_000_000_000, "max_num_seqs": 512, "max_model_len": 4096}
    assert plan_for(**wishes).swap_bytes == 3_000_000_000
    facts = msgspec.structs.replace(FACTS, kv_bytes_per_token=10_000)
    without, shared = plan_for(facts, max_num_seqs=512).num_kv_tokens, plan_for(facts, **wishes).num_kv_tokens
    assert abs(without - shared - 150_000) <= 64  # half of what is left becomes the cache
    apart = msgspec.structs.replace(facts, free_host_memory=4_000_000_000)
    assert plan_for(apart, **wishes).num_kv_tokens == without
    with pytest.raises(ConfigError, match=r"--swap-memory 4.7 GiB is more than the 3.7 GiB free on the host"):
        plan_for(apart, swap_memory=5_000_000_000)


def test_context_is_cut_to_the_cache_but_a_stated_one_is_an_error() -> None:
    assert plan_for(kv_memory=128_000).max_model_len == 128
    with pytest.raises(ConfigError, match=r"--max-model-len 2000 needs 2.0 MiB .*--kv-memory"):
        plan_for(kv_memory=128_000, max_model_len=2000)


def test_small_model_runs_on_one_thread() -> None:
    """Bug: barriers between threads for matrices of a few kilobytes: 13 instead of 1,050 tok/s on a busy machine."""
    assert plan_for(ModelFacts(4096, 1000, 1_000_000, 10**10, 8, False)).threads == 1


def test_auto_device_and_threads() -> None:
    plan = plan_for()
    assert (plan.device, plan.threads) == ("cpu", 2)
    assert plan_for(threads=1).threads == 1


def test_more_threads_than_cores_are_refused() -> None:
    """Bug: --threads 1000 is taken without a word, and tokens come by the minute."""
    assert plan_for(threads=2).threads == 2
    with pytest.raises(ConfigError, match="--threads 3 is more than the 2 cores this process may use"):
        plan_for(threads=3)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"page_size": 48}, "--page-size 48 is not one of 16, 32, 64, 128"),
        ({"max_batch_tokens": 8}, "--max-batch-tokens 8 is less than --max-num-seqs 64"),
        ({"max_model_len": 5000}, "5000 exceeds the 4096"),
        ({"device": "cuda"}, "--device cpu"),
        ({"kv_memory": 10}, "holds no page"),
        ({"kv_memory": 7_000_000_000, "swap_memory": 10**9}, "beside the weights and the swap space"),
        (
            {"kv_memory": 9_000_000_000},
            "--kv-memory 8.4 GiB is more than the 7.2 GiB that are free beside the weights: lower it",
        ),
    ],
)
def test_impossible_wishes_are_refused_by_name(wishes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_for(**wishes)  # type: ignore[arg-type]


def test_no_room_for_a_cache_says_what_takes_the_room() -> None:
    with pytest.raises(ConfigError, match=r"2.0 GiB are free and the weights take 1.9 GiB: no room is left"):
        plan_for(ModelFacts(4096, 1000, 2_000_000_000, 2_100_000_000, 2, False))


@pytest.mark.parametrize(
    ("num_bytes", "nearest", "needed", "free"),
    [
        (0, "0 B", "0 B", "0 B"),
        (1023, "1023 B", "1023 B", "1023 B"),
        (1024, "1.0 KiB", "1.0 KiB", "1.0 KiB"),
        (484_000, "472.7 KiB", "472.7 KiB", "472.6 KiB"),
        (5 * 2**30 + 1, "5.0 GiB", "5.1 GiB", "5.0 GiB"),
        (3 * 2**50, "3072.0 TiB", "3072.0 TiB", "3072.0 TiB"),
    ],
)
def test_sizes_for_people_err_on_the_safe_side(num_bytes: int, nearest: str, needed: str, free: str) -> None:
    """Bug: "needs 472.6 KiB", which is refused when it is given."""
    assert (size(num_bytes), size(num_bytes, math.ceil), size(num_bytes, math.floor)) == (nearest, needed, free)
