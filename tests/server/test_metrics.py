"""What Prometheus scrapes."""

import msgspec
import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import Failed, Stats
from tests.fakes import PLAN, FakeEngine, Script, say
from tests.server.conftest import World

pytestmark = pytest.mark.anyio

NAMES = {  # what dashboards ask for; a name that changes breaks them
    "nibble_asyncio_tasks",
    "nibble_cache_config_info",
    "nibble_e2e_request_latency_seconds",
    "nibble_engine_batch_tokens",
    "nibble_engine_step_seconds",
    "nibble_engine_steps",
    "nibble_engine_up",
    "nibble_generation_tokens",
    "nibble_http_responses",
    "nibble_inter_token_latency_seconds",
    "nibble_kv_bytes_cached",
    "nibble_kv_bytes_total",
    "nibble_kv_bytes_used",
    "nibble_kv_cache_usage_perc",
    "nibble_kv_effective_bits",
    "nibble_kv_pages_cached",
    "nibble_kv_pages_total",
    "nibble_kv_pages_used",
    "nibble_kv_tokens_held",
    "nibble_num_preemptions",
    "nibble_num_requests_running",
    "nibble_num_requests_waiting",
    "nibble_prefix_cache_cut",
    "nibble_prefix_cache_hits",
    "nibble_prefix_cache_queries",
    "nibble_prompt_tokens",
    "nibble_request_decode_time_seconds",
    "nibble_request_failure",
    "nibble_request_generation_tokens",
    "nibble_request_params_max_tokens",
    "nibble_request_params_n",
    "nibble_request_prefill_time_seconds",
    "nibble_request_prompt_tokens",
    "nibble_request_queue_time_seconds",
    "nibble_request_success",
    "nibble_swap_bytes_used",
    "nibble_swap_in_bytes",
    "nibble_swap_out_bytes",
    "nibble_swaps_in",
    "nibble_swaps_out",
    "nibble_time_to_first_token_seconds",
}


async def scrape(world: World) -> dict[str, float]:
    """Every sample without its labels, summed over them."""
    response = await world.http.get("/metrics")
    assert response.headers["content-type"] == CONTENT_TYPE_LATEST
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0) + sample.value
    return values


async def test_names_are_kept() -> None:
    response = await World(FakeEngine()).http.get("/metrics")
    names = {family.name for family in text_string_to_metric_families(response.text)}
    of_processes = {name for name in names if "process_" in name}  # the client library's, where there is a /proc
    assert {name for name in names - of_processes if not name.endswith("_created")} == NAMES


async def test_failures_count_from_nothing() -> None:
    """Bug: the first failure of its kind, which Prometheus cannot tell from a series that was always 1."""
    text = (await World(FakeEngine()).http.get("/metrics")).text
    assert 'nibble_request_failure_total{kind="engine"} 0.0' in text
    assert 'nibble_request_success_total{finished_reason="stop"} 0.0' in text


async def test_a_request_is_counted_once_in_every_place() -> None:
    """Bug: choices counted as requests, prompts counted once for each choice."""
    world = World(FakeEngine(lambda submit: say("abc")))
    await world.text(n=2)
    values = await scrape(world)
    assert values["nibble_prompt_tokens_total"] == 3
    assert values["nibble_generation_tokens_total"] == 8
    assert values["nibble_time_to_first_token_seconds_count"] == 2
    assert values["nibble_inter_token_latency_seconds_count"] == 6
    assert values["nibble_e2e_request_latency_seconds_count"] == 2
    assert values["nibble_request_queue_time_seconds_sum"] == 0.02
    assert values["nibble_request_params_n_sum"] == 2
    assert values["nibble_request_success_total"] == 2
    assert values["nibble_request_failure_total"] == 0


async def test_engines_own_figures_are_copied() -> None:
    stats = Stats(num_running=2, num_waiting=3, pages_used=16, pages_total=64, prefix_hits_total=5, preemptions_total=7)
    values = await scrape(World(FakeEngine(stats=stats)))
    assert values["nibble_num_requests_running"] == 2
    assert values["nibble_num_requests_waiting"] == 3
    assert values["nibble_kv_cache_usage_perc"] == 0.25
    assert values["nibble_prefix_cache_hits_total"] == 5
    assert values["nibble_num_preemptions_total"] == 7
    assert values["nibble_engine_up"] == 1


async def test_memory_is_told_by_tier() -> None:
    """Bug: effective bits that leave out the window, or count a page for each of its holders."""
    plan = msgspec.structs.replace(PLAN, kv_elements_per_token=100, bytes_per_page=800, bytes_per_recent_page=3200)
    stats = Stats(
        pages_used=3, pages_cached=5, pages_total=20, tokens_held=40, prefix_cut_total=64,
        recent_pages_used=2, recent_pages_cached=1, recent_pages_total=4, recent_tokens_held=20,
    )  # fmt: skip
    world = World(FakeEngine(stats=stats, plan=plan))
    sample = world.service.metrics.registry.get_sample_value
    for name, page, recent in (
        ("nibble_kv_tokens_held", 40, 20),
        ("nibble_kv_bytes_used", 2400, 6400),
        ("nibble_kv_bytes_cached", 4000, 3200),
        ("nibble_kv_bytes_total", 16000, 12800),
    ):
        assert (sample(name, {"tier": "page"}), sample(name, {"tier": "recent"})) == (page, recent)
    assert sample("nibble_kv_effective_bits") == 8 * (2400 + 6400) / (40 * 100)
    assert sample("nibble_prefix_cache_cut_total") == 64
    assert World(FakeEngine()).service.metrics.registry.get_sample_value("nibble_kv_effective_bits") == 0


async def test_failures_are_counted_by_kind() -> None:
    world = World(FakeEngine(lambda submit: Script(failure=Failed(submit.id, "capacity", "too big"))))
    await world.text()
    sample = world.service.metrics.registry.get_sample_value
    assert sample("nibble_request_failure_total", {"kind": "capacity"}) == 1


async def test_scrape_works_before_the_model_is_loaded() -> None:
    values = await scrape(World(FakeEngine(state="starting")))
    assert values["nibble_engine_up"] == 0
    assert values["nibble_kv_cache_usage_perc"] == 0


async def test_two_servers_in_one_process_do_not_share() -> None:
    """Bug: metrics in the global registry."""
    one, other = World(FakeEngine()), World(FakeEngine())
    await one.text()
    assert (await scrape(other))["nibble_prompt_tokens_total"] == 0
