"""From a configuration to an engine that steps: the only place that joins checkpoint, plan, model, cache and core."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from msgspec import structs

from engine.auto_policy import decided
from engine.checkpoint.errors import CheckpointError
from engine.config import ConfigError, EngineConfig, ModelFacts, Plan, resolve, size
from engine.core import EngineCore, Parts
from engine.graphs import runner_for
from engine.loading import Checkpoint, LoadedModel, load_model, model_facts, open_checkpoint
from engine.messages import Cancel, Failed, Inbound, Loading, PlanSummary, Sampling, Submit
from engine.models.config import UnsupportedModel
from engine.runner import Runner
from kernels import native
from kernels.contract import KernelRefused
from kvcache.calibration import FILE_NAME, CalibrationError
from kvcache.layout import PageLayout
from kvcache.manager import KVCacheManager, RecentSizes
from kvcache.policy import PolicyError
from kvcache.storage import PageStorage

MEASURED_TOKENS = 8  # decode steps timed at start: enough for a median
MEASURED_SECONDS = 1.0  # unless the model is so slow that this is over before

OnLoading = Callable[[Loading], None]


class StartError(RuntimeError):
    """The engine cannot start; the message says what to do about it."""


def build(config: EngineConfig, on_loading: OnLoading | None = None) -> tuple[EngineCore, PlanSummary]:
    """Load the model and return an engine that has proved it can decode. Raises StartError."""
    started = time.monotonic()
    try:
        checkpoint = open_checkpoint(Path(config.model), _progress(on_loading))
        config, policy_note = decided(config, checkpoint)
        facts = model_facts(checkpoint, config)
        plan = resolve(config, facts)
        _set_threads(plan.threads)
        loaded = load_model(checkpoint, plan)
        facts, plan = _with_weights(config, facts, plan)
        torch.set_num_threads(_torch_threads(loaded, plan))
        layout = loaded.layout
        storage = _allocate(layout, plan)
    except (CalibrationError, CheckpointError, ConfigError, KernelRefused, PolicyError, UnsupportedModel) as error:
        raise StartError(str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise StartError(f"not enough memory for the weights: {error}. Use a smaller model") from error
    load_seconds = time.monotonic() - started
    vocab_size, eos_token_ids = checkpoint.config.vocab_size, checkpoint.config.eos_token_ids
    runner, graph_note = _runner(loaded, storage, plan)

    def core(manager: KVCacheManager) -> EngineCore:
        return EngineCore(Parts(plan, runner, storage, manager, loaded.sampler, vocab_size, eos_token_ids))

    speed = measure_decode(core(make_manager(plan, layout, "measurement")), plan)
    salt = f"{checkpoint.folder.resolve()}:{layout.salt}"
    found = (policy_note, graph_note, runner.note, _gpu_note(facts, plan, layout))
    notes = tuple(note for note in found if note is not None)
    summary = _summary(checkpoint, plan, replace(loaded, notes=(*loaded.notes, *notes)), (load_seconds, speed))
    return core(make_manager(plan, layout, salt)), summary


def _set_threads(num_threads: int) -> None:
    """Of the native pool; torch has one while weights are read. Raises StartError when there are not so many."""
    try:
        native.set_num_threads(num_threads)
    except RuntimeError as error:
        raise StartError(str(error)) from error
    # Weights are unpacked in small pieces: on a busy machine a 1B model's 4-bit blocks took 70 s with two torch
    # threads, which wait for each other at every step, and 8 to 11 with one.
    torch.set_num_threads(1)


def _torch_threads(loaded: LoadedModel, plan: Plan) -> int:
    """All threads where products run in torch. Beside the native pool torch's own would only take cores from it, also
    where attention runs in torch: with both on two busy cores, a decode step of a 1B model took 1.5 s in place of 0.06.
    """
    multiplies = any(use.kernel == "reference" and use.num_bytes for use in loaded.kernels)
    return plan.threads if multiplies else 1


def _with_weights(config: EngineConfig, facts: ModelFacts, plan: Plan) -> tuple[ModelFacts, Plan]:
    """Facts and plan with the weights as they lie on a GPU, whose cache takes most of what they leave: packed for its
    kernels, codes of 5 to 7 bits take 8, and those of Q6_K with their scales a third more than in the file.

    Raises ConfigError when they leave too little.
    """
    if plan.device != "cuda":
        return facts, plan
    torch.cuda.empty_cache()  # what packing took beside them
    facts = structs.replace(facts, weight_bytes=facts.free_memory - torch.cuda.mem_get_info()[0])
    return facts, structs.replace(resolve(config, facts), threads=plan.threads)


def _allocate(layout: PageLayout, plan: Plan) -> PageStorage:
    """The cache. torch reports a failed allocation as a plain RuntimeError on a CPU. Raises StartError."""
    try:
        return PageStorage(layout, plan.num_pages, torch.device(plan.device), plan.num_recent_pages)
    except (RuntimeError, MemoryError) as error:
        raise StartError(
            f"the KV cache of {size(_cache_bytes(layout, plan))} cannot be had; lower --kv-memory ({error})"
        ) from error


def _cache_bytes(layout: PageLayout, plan: Plan) -> int:
    return layout.bytes_per_page * plan.num_pages + layout.bytes_per_recent_page * plan.num_recent_pages


def _runner(loaded: LoadedModel, storage: PageStorage, plan: Plan) -> tuple[Runner, str | None]:
    """What runs steps, and a note where it is not the fastest way. Raises StartError."""
    try:
        loaded.sampler.prepare(loaded.model.config.vocab_size, torch.device(plan.device))
        return runner_for(loaded.model, storage.layers, plan)
    except torch.OutOfMemoryError as error:
        raise StartError(f"no memory is left to run a step: lower --kv-memory or --max-num-seqs ({error})") from error


def measure_decode(core: EngineCore, plan: Plan) -> float:
    """Tokens per second of one sequence at the shortest context: the median of a few steps, or of what time allows.

    The first step also warms caches and threads, so it counts only when it has used up the time by itself. Raises
    StartError when the model produces nothing that can be sampled.
    """
    num_tokens = min(MEASURED_TOKENS + 1, plan.max_model_len - 1)
    if num_tokens < 1:
        return 0.0
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    inbox: list[Inbound] = [Submit("measurement", [0], sampling, time.monotonic())]
    started = time.monotonic()
    seconds: list[float] = []
    while inbox or core.has_work:
        before = time.monotonic()
        for event in core.step(inbox):
            if isinstance(event, Failed):
                raise StartError(f"the model cannot decode: {event.message}")
        now = time.monotonic()
        seconds.append(now - before)
        inbox = []
        if now - started > MEASURED_SECONDS:
            core.step([Cancel("measurement")])
    timed = seconds[1:] or seconds
    return 1.0 / sorted(timed)[len(timed) // 2]


def _progress(on_loading: OnLoading | None) -> Callable[[int, int], None] | None:
    if on_loading is None:
        return None
    return lambda done, total: on_loading(Loading(done, total))


def make_manager(plan: Plan, layout: PageLayout, salt: str) -> KVCacheManager:
    """The book-keeping of the plan's pages. salt: what names their content besides the tokens."""
    rule = layout.rule_of(layout.policy.window)
    recent = RecentSizes(plan.num_recent_pages, rule) if plan.num_recent_pages else None
    return KVCacheManager(plan.num_pages, plan.page_size, salt, plan.prefix_caching, recent)


def _summary(checkpoint: Checkpoint, plan: Plan, loaded: LoadedModel, timing: tuple[float, float]) -> PlanSummary:
    load_seconds, tokens_per_s = timing
    layout = loaded.layout
    return PlanSummary(
        model=str(checkpoint.path),
        architecture=checkpoint.config.architecture,
        format=checkpoint.format.describe(),
        device=loaded.device,
        dtype=loaded.dtype,
        kernels=loaded.kernels,
        kv_policy=plan.kv_policy,
        page_size=plan.page_size,
        num_pages=plan.num_pages,
        kv_bytes_per_token=layout.bytes_per_token,
        kv_elements_per_token=layout.elements_per_token,
        bytes_per_page=layout.bytes_per_page,
        bytes_per_recent_page=layout.bytes_per_recent_page,
        num_recent_pages=plan.num_recent_pages,
        kv_request_window=plan.kv_request_window,
        kv_prefill=plan.kv_prefill,
        weight_bytes=loaded.weight_bytes,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_batch_tokens=plan.max_batch_tokens,
        prefix_caching=plan.prefix_caching,
        swap_bytes=plan.swap_bytes,
        threads=plan.threads,
        vocab_size=checkpoint.config.vocab_size,
        load_seconds=load_seconds,
        decode_tokens_per_s=tokens_per_s,
        eos_token_ids=checkpoint.config.eos_token_ids,
        notes=(
            *_missing(plan),
            *checkpoint.config.notes,
            *loaded.notes,
            *_memory_note(checkpoint, plan),
            *_calibration_note(layout),
            *_recent_note(layout, plan),
        ),
    )


def _missing(plan: Plan) -> tuple[str, ...]:
    """What to do about a CPU that runs on torch because nothing else was built."""
    return (native.MISSING,) if native.MISSING is not None and plan.device == "cpu" else ()


def _memory_note(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    context_len = checkpoint.config.context_len
    if plan.max_model_len < context_len and plan.max_model_len == plan.num_kv_tokens:
        return (f"context limited to {plan.max_model_len:,} of {context_len:,} tokens by the memory of the KV cache",)
    return ()


def _gpu_note(facts: ModelFacts, plan: Plan, layout: PageLayout) -> str | None:
    """Where a GPU's memory went, once everything that stays is there."""
    if plan.device != "cuda":
        return None
    torch.cuda.empty_cache()
    free, cache = torch.cuda.mem_get_info()[0], _cache_bytes(layout, plan)
    steps = max(0, facts.free_memory - facts.weight_bytes - cache - free)
    return (
        f"GPU memory: {size(facts.weight_bytes)} of weights, {size(cache)} of KV cache, {size(steps)} of recorded "
        f"steps and kernels, {size(free)} free"
    )


def _calibration_note(layout: PageLayout) -> tuple[str, ...]:
    """What a policy that would use an artifact runs on."""
    if layout.calibration is not None:
        held = layout.calibration
        return (f"KV cache calibrated on {held.header.provenance} (artifact {held.digest[:8]})",)
    if layout.policy.is_calibrated:
        return (f"KV cache not calibrated: no {FILE_NAME}, so heads are rotated instead; nibble calibrate makes one",)
    return ()


def _recent_note(layout: PageLayout, plan: Plan) -> tuple[str, ...]:
    """What is not read at the policy's precision."""
    if plan.num_recent_pages == 0:
        return ()
    policy, limit = layout.policy, plan.kv_request_window
    asked = f"; up to {limit:,} tokens of a request that asks for it are" if limit else ""
    prompts = "; prompts read all of their tokens in float16 (--kv-prefill exact)" if plan.kv_prefill == "exact" else ""
    own = f"the last {policy.window} tokens and the first {policy.num_sinks} of a sequence are read in float16"
    said = f"{own}{asked}{prompts}" if policy.window or policy.num_sinks else f"{asked}{prompts}".removeprefix("; ")
    return (said,)
