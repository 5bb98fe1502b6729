"""Every Prometheus metric, declared once. Names are vLLM's with the prefix nibble_, so dashboards carry over.

The server measures what a client feels (time to first token, between tokens, end to end) and copies what the engine
measured of itself from its newest Stats when /metrics is read.
"""

import asyncio
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from engine.client import EngineClient
from engine.messages import Done, PlanSummary, Submit

Metric = CounterMetricFamily | GaugeMetricFamily | InfoMetricFamily

FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
STAGE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
TOKENS_HELD = "Tokens on KV pages held by sequences, shared ones counted once; recent ones lie on both kinds of pages"
EFFECTIVE_BITS = (
    "Bits for each key or value number held now: pages, recent pages, what is reserved on them; 0 when empty"
)
PREFIX_CUT = (
    "Prompt tokens on cached pages that had to be computed: their window was gone (a hit computes nothing again)"
)
REASONS = ("stop", "length")
FAILURES = (
    *("invalid", "capacity", "engine"),  # the engine's Failed
    *("disconnected", "queue_full", "unavailable", "unauthorized", "rate_limited"),
)
CHOICES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        ProcessCollector(registry=self.registry)
        ProcessCollector("nibble_engine", lambda: engine.process_id or "none", registry=self.registry)
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to first token", FIRST_TOKEN_S)
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between two tokens", BETWEEN_TOKENS_S)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to last token", REQUEST_S)
        self.queue_time = self._histogram("request_queue_time_seconds", "Waiting in the engine's queue", STAGE_S)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "Computing the prompt", STAGE_S)
        self.decode_time = self._histogram("request_decode_time_seconds", "Making the answer", STAGE_S)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of a choice", TOKENS)
        self.params_n = self._histogram("request_params_n", "Choices asked for", CHOICES)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "The limit max_tokens", TOKENS)
        self.prompt_tokens = Counter("nibble_prompt_tokens", "Prompt tokens taken in", registry=self.registry)
        self.generation_tokens = Counter("nibble_generation_tokens", "Tokens generated", registry=self.registry)
        self.success = Counter(
            "nibble_request_success", "Choices that ended well", ["finished_reason"], registry=self.registry
        )
        self.failure = Counter(
            "nibble_request_failure", "Requests that ended without an answer", ["kind"], registry=self.registry
        )
        self.responses = Counter(
            "nibble_http_responses",
            "Answers of the API that ended, by HTTP status",
            ["status"],
            registry=self.registry,
        )
        self._begin()

    def submitted(self, submit: Submit) -> None:
        self.prompt_tokens.inc(len(submit.prompt))
        self.request_prompt_tokens.observe(len(submit.prompt))
        self.params_n.observe(submit.n)
        self.params_max_tokens.observe(submit.sampling.max_tokens)

    def finished(self, reason: str, num_tokens: int, seconds: float) -> None:
        """A choice ended well, `seconds` after its request arrived."""
        self.success.labels(reason).inc()
        self.request_generation_tokens.observe(num_tokens)
        self.end_to_end.observe(seconds)

    def stages(self, done: Done) -> None:
        """What the engine measured of a choice that it ended itself."""
        self.queue_time.observe(done.queued_s)
        self.prefill_time.observe(done.prefill_s)
        self.decode_time.observe(done.decode_s)

    def refused(self, kind: str) -> None:
        """kind: one of FAILURES."""
        self.failure.labels(kind).inc()

    def answered(self, status: int) -> None:
        """The answer to a request of the API began with this status."""
        self.responses.labels(status).inc()

    def exposition(self) -> bytes:
        """The text Prometheus scrapes."""
        return generate_latest(self.registry)

    def _begin(self) -> None:
        """Every label that alerts look at counts from 0: Prometheus sees no increase in what begins at 1."""
        for reason in REASONS:
            self.success.labels(reason)
        for kind in FAILURES:
            self.failure.labels(kind)
        self.responses.labels(200)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"nibble_{name}", help, buckets=buckets, registry=self.registry)


class EngineCollector(Collector):
    """The engine's own figures, as of its newest Stats."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield GaugeMetricFamily("nibble_engine_up", "1 when the engine takes requests", self._engine.state == "ready")
        yield GaugeMetricFamily("nibble_num_requests_running", "Sequences in the batch", stats.num_running)
        yield GaugeMetricFamily("nibble_num_requests_waiting", "Sequences in the queue", stats.num_waiting)
        yield GaugeMetricFamily(
            "nibble_kv_cache_usage_perc",
            "Share of KV pages in use, 0 to 1",
            stats.pages_used / max(stats.pages_total, 1),
        )
        yield GaugeMetricFamily("nibble_kv_pages_used", "KV pages held by sequences", stats.pages_used)
        yield GaugeMetricFamily("nibble_kv_pages_cached", "KV pages held by the prefix cache alone", stats.pages_cached)
        yield GaugeMetricFamily("nibble_kv_pages_total", "KV pages", stats.pages_total)
        yield GaugeMetricFamily(
            "nibble_swap_bytes_used", "Host memory of sequences that are swapped out", stats.swap_bytes_used
        )
        yield GaugeMetricFamily("nibble_asyncio_tasks", "Tasks of the server's event loop", _num_tasks())
        yield from self._tiers()
        yield from self._counters()
        if self._engine.ready is not None:
            yield _cache_info(self._engine.ready.plan)

    def _tiers(self) -> Iterator[Metric]:
        """Of the kinds of memory that a token may lie in. The plan, which has the sizes, is not there at first."""
        stats, ready = self._engine.stats, self._engine.ready
        tokens = GaugeMetricFamily("nibble_kv_tokens_held", TOKENS_HELD, labels=["tier"])
        tokens.add_metric(["page"], stats.tokens_held)
        tokens.add_metric(["recent"], stats.recent_tokens_held)
        yield tokens
        sizes = (ready.plan.bytes_per_page, ready.plan.bytes_per_recent_page) if ready else (0, 0)
        used = stats.pages_used * sizes[0], stats.recent_pages_used * sizes[1]
        for name, help, counts in (
            ("used", "Bytes of KV pages held by sequences", (stats.pages_used, stats.recent_pages_used)),
            ("cached", "Bytes held by the prefix cache alone", (stats.pages_cached, stats.recent_pages_cached)),
            ("total", "Bytes of the KV cache", (stats.pages_total, stats.recent_pages_total)),
        ):
            family = GaugeMetricFamily(f"nibble_kv_bytes_{name}", help, labels=["tier"])
            for tier, count, size in zip(("page", "recent"), counts, sizes, strict=True):
                family.add_metric([tier], count * size)
            yield family
        elements = stats.tokens_held * ready.plan.kv_elements_per_token if ready else 0
        yield GaugeMetricFamily("nibble_kv_effective_bits", EFFECTIVE_BITS, 8 * sum(used) / elements if elements else 0)

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, help, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_queries_total),
            ("prefix_cache_hits", "Prompt tokens found there", stats.prefix_hits_total),
            ("prefix_cache_cut", PREFIX_CUT, stats.prefix_cut_total),
            ("num_preemptions", "Sequences that gave their pages to others", stats.preemptions_total),
            ("swaps_out", "Preempted sequences whose pages were copied to the host", stats.swaps_out_total),
            ("swaps_in", "Sequences that went on from there", stats.swaps_in_total),
            ("swap_out_bytes", "Bytes copied to the host", stats.swap_bytes_out_total),
            ("swap_in_bytes", "Bytes copied back", stats.swap_bytes_in_total),
            ("engine_steps", "Steps of the engine", stats.steps_total),
            ("engine_batch_tokens", "Tokens computed, prompts and answers", stats.batch_tokens_total),
            ("engine_step_seconds", "Time spent in steps", stats.step_seconds_total),
        ):
            yield CounterMetricFamily(f"nibble_{name}", help, value)


def _num_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # read where no loop runs
        return 0


def _cache_info(plan: PlanSummary) -> InfoMetricFamily:
    labels = {
        "kv_policy": plan.kv_policy,
        "page_size": str(plan.page_size),
        "num_pages": str(plan.num_pages),
        "bytes_per_token": str(plan.kv_bytes_per_token),
        "prefix_caching": str(plan.prefix_caching).lower(),
    }
    return InfoMetricFamily("nibble_cache_config", "How the KV cache is set up", labels)
