"""A run: requests sent at their times, followed to their ends."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.bench.arrivals import Arrivals
from server.bench.client import Outcome, Target, ask
from server.bench.datasets import Prompt

METRICS_LIMIT_S = 5.0
# Names of the counters of prompt tokens looked up and found: ours and vLLM's.
HIT_COUNTERS = (
    ("nibble_prefix_cache_queries", "nibble_prefix_cache_hits"),
    ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits"),
)


@dataclass
class Progress:
    """How far a run is, for whoever watches."""

    total: int
    outcomes: list[Outcome]  # ended ones
    in_flight: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """Everything that was asked and what came of it."""

    outcomes: list[Outcome]  # in the order of sending times
    prefix_hit_rate: float | None


OnProgress = Callable[[Progress], None]


async def run(
    client: httpx.AsyncClient,
    target: Target,
    prompts: Sequence[Prompt],
    arrivals: Arrivals,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Run:
    """Send every prompt once. `on_progress` is called whenever a request is sent or ends."""
    before = await prefix_counts(client, target)
    gate = asyncio.Semaphore(arrivals.clients or len(prompts))
    progress = Progress(len(prompts), [])
    started = time.perf_counter()

    def tell() -> None:
        progress.seconds = time.perf_counter() - started
        if on_progress is not None:
            on_progress(progress)

    async def one(prompt: Prompt, scheduled: float) -> Outcome:
        await asyncio.sleep(max(0.0, scheduled - (time.perf_counter() - started)))
        async with gate:
            sent = time.perf_counter() - started
            outcome = Outcome(sent if arrivals.rate is None else scheduled, sent)
            progress.in_flight += 1
            tell()
            try:
                await ask(client, target, prompt, outcome)
            finally:
                progress.in_flight -= 1
            progress.outcomes.append(outcome)
            tell()
        return outcome

    times = arrivals.times(len(prompts), seed)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(prompt, at)) for prompt, at in zip(prompts, times, strict=True)]
    after = await prefix_counts(client, target)
    return Run([task.result() for task in tasks], _hit_rate(before, after))


def new_client(api_key: str | None, timeout_s: float) -> httpx.AsyncClient:
    """One pool of connections for all requests, as many as there are; `timeout_s` is the longest silence."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(headers=headers, limits=limits, timeout=httpx.Timeout(timeout_s))


async def prefix_counts(client: httpx.AsyncClient, target: Target) -> tuple[float, float] | None:
    """Prompt tokens looked up and found so far, by the server's /metrics; None where they are not told."""
    try:
        url = httpx.URL(target.metrics_url or f"{target.url}/metrics")
        request = client.build_request("GET", url, timeout=METRICS_LIMIT_S)
        if url.netloc != httpx.URL(target.url).netloc:
            request.headers.pop("authorization", None)  # the key is for the server alone
        response = (await client.send(request)).raise_for_status()
        families = {family.name: family for family in text_string_to_metric_families(response.text)}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    for queries, hits in HIT_COUNTERS:
        if queries in families and hits in families:
            sums = (sum(s.value for s in families[n].samples if s.name == f"{n}_total") for n in (queries, hits))
            return next(sums), next(sums)
    return None


def _hit_rate(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    return (after[1] - before[1]) / (after[0] - before[0])
