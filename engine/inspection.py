"""The roofline of a model on this machine, and the memory of its cache: inspect(config) -> Inspection."""

from engine.assembly import OnLoading, build
from engine.config import EngineConfig
from engine.machine import num_cores
from engine.messages import CacheMemory, Inspection, PlanSummary, SequenceMemory
from kernels import native
from kvcache.layout import RECENT_BYTES, PageLayout

LENGTHS = (1024, 4096, 32768)  # of sequences whose memory is shown, and the longest


def inspect(config: EngineConfig, on_loading: OnLoading | None = None) -> Inspection:
    """Load the model, measure how fast it decodes and how fast memory can be read. Raises StartError."""
    core, plan = build(config, on_loading)
    on_cpu = plan.device == "cpu"
    return Inspection(
        plan=plan,
        weight_bytes_per_token=sum(use.num_bytes for use in plan.kernels),
        bandwidth=native.read_bandwidth(min(plan.threads, num_cores())) if on_cpu else None,
        isa=native.isa() if on_cpu else None,
        kv=cache_memory(core.parts.storage.layout, plan),
    )


def cache_memory(layout: PageLayout, plan: PlanSummary) -> CacheMemory:
    """What the plan's cache holds, and what sequences take of it."""
    f16_bytes = RECENT_BYTES * layout.elements_per_token
    lengths = sorted({n for n in (*LENGTHS, plan.max_model_len) if n <= plan.max_model_len})
    return CacheMemory(
        bits=layout.effective_bits,
        num_bytes=plan.kv_bytes,
        num_tokens=plan.num_pages * plan.page_size,
        num_f16_tokens=plan.kv_bytes // (f16_bytes * plan.page_size) * plan.page_size,
        f16_bytes_per_token=f16_bytes,
        break_even_tokens=layout.break_even_tokens,
        sequences=[sequence_memory(layout, n) for n in lengths],
    )


def sequence_memory(layout: PageLayout, num_tokens: int) -> SequenceMemory:
    """Of a sequence with `num_tokens` stored, whole pages of both kinds."""
    num_pages = -(-num_tokens // layout.page_size)
    num_recent = 0 if layout.read_rule is None else len(layout.read_rule.before(num_tokens))
    page_bytes, recent_bytes = num_pages * layout.bytes_per_page, num_recent * layout.bytes_per_recent_page
    return SequenceMemory(
        num_tokens=num_tokens,
        page_bytes=page_bytes,
        recent_bytes=recent_bytes,
        f16_bytes=num_pages * layout.page_size * RECENT_BYTES * layout.elements_per_token,
        bits=8 * (page_bytes + recent_bytes) / (num_tokens * layout.elements_per_token),
    )
