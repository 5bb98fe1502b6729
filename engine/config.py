"""What a user may decide about the engine, and how every "auto" is decided: resolve(config, facts) -> Plan.

Nothing here imports torch: the server reads these types too. Messages call settings by their flags, --max-model-len;
engine/llm.py translates them for those who write Python.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engine.checks import check

Device = Literal["auto", "cpu", "cuda"]
Activations = Literal["int8", "float"]
HeadBits = Literal[8, 16]
Prefill = Literal["windowed", "exact"]
Count = Annotated[int, Meta(ge=1)]
Tokens = Annotated[int, Meta(ge=0)]
Bytes = Annotated[int, Meta(ge=1, title="bytes")]
SwapBytes = Annotated[int, Meta(ge=0, title="bytes")]
PAGE_SIZES = (16, 32, 64, 128)
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
KV_SHARE_OF_FREE_MEMORY = 0.5  # of what is free once weights are counted, when --kv-memory is not given
KV_SHARE_ON_GPU = 0.85  # where nothing else grows: the rest is for a step's own tensors, which recorded graphs hold
SMALL_MODEL_BYTES = 16 << 20  # below this one thread decodes faster: waiting for the others costs more than their help
RECENT_TOKENS = 16  # of a recent page (kernels/attention/quantized/layout.py)
TYPICAL_TOKENS = 1024  # of a sequence: how many windows are provided for
ACTIVATION_RESERVE_BYTES = 256 << 20  # working memory of one step, kept out of the cache


class ConfigError(ValueError):
    """A setting cannot be honoured; the message names it and what would work."""


class EngineConfig(msgspec.Struct, frozen=True):
    """The user's wishes. None and "auto" are decided by `resolve`. Raises ValueError naming a field of another type."""

    model: str  # a folder, or a GGUF file
    device: Device = "auto"  # the CPU: the kernels for "cuda" have not run on a GPU yet
    kernel: str = "auto"  # or the name of one back end every layer must use
    kv_policy: str = "auto"  # or a name of kvcache/policy.py
    kv_calibration: str | None = None  # a file; None: the one beside the checkpoint, if the policy uses one
    kv_memory: Bytes | None = None
    kv_request_window: Tokens = 0  # most that a request may have in high precision by asking; 0: it may not ask
    kv_prefill: Prefill = "windowed"  # how prompts read a quantized cache: as answers do, or in float16 throughout
    page_size: int = 64  # one of PAGE_SIZES
    max_model_len: Count | None = None
    max_num_seqs: Count = 64
    max_batch_tokens: Count = 512
    prefix_caching: bool = True
    swap_memory: SwapBytes = 0  # of the host, for preempted sequences; 0: they are computed again
    threads: Count | None = None
    activations: Activations = "int8"  # what multiplies quantized weights where a kernel can choose
    head_bits: HeadBits = 8  # of an output head that the checkpoint left in 16 or 32 bits; 16 keeps it as it is

    def __post_init__(self) -> None:
        check(self)


class ModelFacts(msgspec.Struct, frozen=True):
    """What `resolve` must know of the model and the machine."""

    max_position: int  # the context the checkpoint was made for, after RoPE scaling
    kv_bytes_per_token: int  # of a page, all layers, keys and values
    weight_bytes: int
    free_memory: int  # bytes available before the weights are read, on the device
    num_cores: int
    has_cuda: bool
    bytes_per_recent_page: int = 0  # all layers; 0 where the cache keeps no window in high precision
    recent_pages_per_sequence: int = 0  # at most
    recent_pages_per_request: int = 0  # at most, of one that asks for kv_request_window tokens
    window: int | None = None  # of the policy, tokens; None where nothing is quantized
    free_host_memory: int | None = None  # bytes; None on a CPU, where it is free_memory


class Plan(msgspec.Struct, frozen=True):
    """Every decision, made once. The engine reads only this."""

    device: str
    kernel: str | None  # the one back end insisted on, or None
    kv_policy: str
    page_size: int
    num_pages: int
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    prefix_caching: bool
    threads: int
    activations: Activations
    head_bits: HeadBits
    kv_calibration: str | None = None
    num_recent_pages: int = 0  # RECENT_TOKENS tokens each, in high precision
    kv_request_window: int = 0  # tokens, as in EngineConfig
    kv_prefill: Prefill = "windowed"
    swap_bytes: int = 0

    @property
    def num_kv_tokens(self) -> int:
        return self.num_pages * self.page_size


def resolve(config: EngineConfig, facts: ModelFacts) -> Plan:
    """Decide every "auto". Raises ConfigError naming the setting that cannot be honoured."""
    _check(config, facts)
    max_model_len = config.max_model_len or facts.max_position
    num_pages, num_recent_pages = _num_pages(config, facts, max_model_len)
    capacity = num_pages * config.page_size
    if config.max_model_len is not None and capacity < config.max_model_len:
        needed = _cache_bytes(math.ceil(config.max_model_len / config.page_size), config, facts)
        raise ConfigError(
            f"--max-model-len {config.max_model_len} needs {size(needed, math.ceil)} of KV cache, which holds only "
            f"{capacity} tokens: raise --kv-memory or lower --max-model-len"
            f"{', or use --kv-prefill windowed' if _is_exact(config) else ''}"
        )
    return Plan(
        device="cpu" if config.device == "auto" else config.device,
        kernel=None if config.kernel == "auto" else config.kernel,
        kv_policy=config.kv_policy,
        kv_calibration=config.kv_calibration,
        page_size=config.page_size,
        num_pages=num_pages,
        max_model_len=min(max_model_len, capacity),
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        prefix_caching=config.prefix_caching,
        threads=config.threads or (1 if facts.weight_bytes < SMALL_MODEL_BYTES else facts.num_cores),
        activations=config.activations,
        head_bits=config.head_bits,
        num_recent_pages=num_recent_pages,
        kv_request_window=config.kv_request_window,
        kv_prefill=config.kv_prefill,
        swap_bytes=config.swap_memory,
    )


def _check(config: EngineConfig, facts: ModelFacts) -> None:
    """What a constructor cannot know."""
    if config.page_size not in PAGE_SIZES:
        raise ConfigError(f"--page-size {config.page_size} is not one of {', '.join(map(str, PAGE_SIZES))}")
    if config.max_batch_tokens < config.max_num_seqs:
        raise ConfigError(
            f"--max-batch-tokens {config.max_batch_tokens} is less than --max-num-seqs {config.max_num_seqs}: "
            "every running sequence needs one token in a step"
        )
    if config.max_model_len is not None and config.max_model_len > facts.max_position:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} exceeds the {facts.max_position} positions of the checkpoint"
        )
    if config.threads is not None and config.threads > facts.num_cores:
        cores = "the one core" if facts.num_cores == 1 else f"the {facts.num_cores} cores"
        raise ConfigError(
            f"--threads {config.threads} is more than {cores} this process may use: threads would wait for each other "
            "in every step. Lower it, or leave it out"
        )
    _check_request_window(config.kv_request_window, facts)
    if _is_exact(config) and facts.window is None:
        raise ConfigError("--kv-prefill exact is for quantized caches: this one reads every token in full precision")
    if facts.free_host_memory is not None and config.swap_memory > facts.free_host_memory:
        raise ConfigError(
            f"--swap-memory {size(config.swap_memory, math.ceil)} is more than the "
            f"{size(facts.free_host_memory, math.floor)} free on the host: lower it"
        )
    if config.device == "cuda" and not facts.has_cuda:
        raise ConfigError("--device cuda was asked for, but torch finds no CUDA device: use --device cpu")


def _check_request_window(num_tokens: int, facts: ModelFacts) -> None:
    if num_tokens == 0:
        return
    if facts.window is None:
        raise ConfigError(
            f"--kv-request-window {num_tokens} is for quantized caches: this one reads every token in full precision"
        )
    if num_tokens <= facts.window:
        raise ConfigError(
            f"--kv-request-window {num_tokens} gives a request nothing beyond the {facts.window} tokens of the "
            "policy's own window: choose more, or leave it out"
        )
    if num_tokens > facts.max_position:
        raise ConfigError(
            f"--kv-request-window {num_tokens} exceeds the {facts.max_position} positions of the checkpoint"
        )


def _num_pages(config: EngineConfig, facts: ModelFacts, max_model_len: int) -> tuple[int, int]:
    """Pages of the cache, and recent pages: the byte budget, or a share of free memory, no more than max_num_seqs full
    contexts."""
    shared = config.swap_memory if facts.free_host_memory is None else 0  # a CPU has one memory for both
    free = facts.free_memory - facts.weight_bytes - ACTIVATION_RESERVE_BYTES - shared
    most = config.max_num_seqs * math.ceil(max_model_len / config.page_size)
    if config.kv_memory is not None:
        if config.kv_memory > max(free, 0):
            asked, there_are = size(config.kv_memory, math.ceil), size(max(free, 0), math.floor)
            raise ConfigError(
                f"--kv-memory {asked} is more than the {there_are} that are free beside the weights"
                f"{' and the swap space' if shared else ''}: lower it"
            )
        num_pages = _pages_within(config.kv_memory, config, facts)
        if num_pages < 1:
            least = size(_cache_bytes(1, config, facts), math.ceil)
            raise ConfigError(f"--kv-memory {size(config.kv_memory)} holds no page: raise it to {least} or more")
    else:
        share = KV_SHARE_ON_GPU if config.device == "cuda" else KV_SHARE_OF_FREE_MEMORY
        num_pages = min(most, _pages_within(int(max(free, 0) * share), config, facts))
        if num_pages < 1:
            swap = f", the swap space {size(shared)}" if shared else ""
            raise ConfigError(
                f"{size(facts.free_memory)} are free and the weights take {size(facts.weight_bytes)}{swap}: no room is "
                "left for a KV cache. Use a smaller model or free memory, or set --kv-memory yourself"
            )
    return num_pages, _recent_pages(num_pages, config, facts)


def _recent_pages(num_pages: int, config: EngineConfig, facts: ModelFacts) -> int:
    """The windows and sinks of as many sequences of TYPICAL_TOKENS tokens as the pages hold, at least one and no more
    than may run, but not fewer than one request of kv_request_window takes; and the rows of one step, which all lie in
    recent pages until it ends, or of the longest prompt that the pages hold, when it lies there as a whole."""
    rows = config.max_batch_tokens
    if _is_exact(config):
        rows = max(rows, min(config.max_model_len or facts.max_position, num_pages * config.page_size))
    elif facts.recent_pages_per_sequence == facts.recent_pages_per_request == 0:
        return 0
    num_seqs = min(config.max_num_seqs, math.ceil(num_pages * config.page_size / TYPICAL_TOKENS))
    windows = max(num_seqs * facts.recent_pages_per_sequence, facts.recent_pages_per_request)
    return windows + math.ceil(rows / RECENT_TOKENS)


def _is_exact(config: EngineConfig) -> bool:
    return config.kv_prefill == "exact"


def _cache_bytes(num_pages: int, config: EngineConfig, facts: ModelFacts) -> int:
    pages = num_pages * config.page_size * facts.kv_bytes_per_token
    return pages + _recent_pages(num_pages, config, facts) * facts.bytes_per_recent_page


def _pages_within(num_bytes: int, config: EngineConfig, facts: ModelFacts) -> int:
    """The most pages that fit together with their recent pages."""
    low, high = 0, num_bytes // (config.page_size * facts.kv_bytes_per_token)
    while low < high:
        middle = (low + high + 1) // 2
        if _cache_bytes(middle, config, facts) <= num_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def size(num_bytes: float, rounded: Callable[[float], int] = round) -> str:
    """12.3 MiB. rounded: math.ceil for what is needed, math.floor for what there is."""
    power = max((i for i in range(len(UNITS)) if num_bytes >= 1024**i), default=0)
    digits = 0 if power == 0 else 1
    return f"{rounded(num_bytes / 1024**power * 10**digits) / 10**digits:.{digits}f} {UNITS[power]}"
