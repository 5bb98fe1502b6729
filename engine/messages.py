"""All that crosses the line between server and engine: token ids and native types, encoded with msgspec.

    server -> engine   Submit · Cancel · Shutdown
    engine -> server   Loading* · Ready, then Accepted · Token · PromptLogprobs · Done · Failed · Stats, or StartFailed

A Submit with n choices ends in exactly n Done (one per choice index), or in exactly one Failed.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engine.checks import check

INT64 = 2**63 - 1
NotNegative = Annotated[int, Meta(ge=0, le=INT64)]
Share = Annotated[float, Meta(ge=0, le=1)]
FinishReason = Literal["stop", "length", "cancelled"]
FailureKind = Literal["invalid", "capacity", "engine"]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How ids are drawn from logits. Neutral values switch a rule off. Raises ValueError naming a field that makes no
    sense."""

    max_tokens: NotNegative  # of the answer, at most
    temperature: Annotated[float, Meta(ge=0)] = 1.0  # 0 is greedy
    top_p: Share = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=INT64)] = 0  # 0 and -1 keep all
    min_p: Share = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    logit_bias: dict[NotNegative, float] = {}
    seed: int | None = None
    min_tokens: NotNegative = 0
    stop_token_ids: tuple[NotNegative, ...] = ()
    ignore_eos: bool = False
    num_logprobs: NotNegative | None = None  # None: none; k: the chosen token's and the k most likely
    num_prompt_logprobs: NotNegative | None = None  # likewise, for every prompt token but the first

    def __post_init__(self) -> None:
        check(self)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A new request. `id` must not be in use; `arrival` is time.monotonic() when the server accepted it."""

    id: str
    prompt: list[int]  # at least one token id
    sampling: Sampling
    arrival: float
    n: int = 1  # choices that share the prompt's pages
    priority: int = 0  # lower runs earlier; equal is first come, first served
    kv_policy: str | None = None  # a higher precision than the server's, as --kv would name it; None: the server's


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop a request, or one choice of it; what was unfinished ends with Done(reason="cancelled").

    Unknown ids are ignored, and so is a single choice that has no token yet: the others may start from it.
    """

    id: str
    index: int | None = None  # None: every choice


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop now; the server has drained what it wanted to drain."""


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Sent at once, and first, for a Submit with a kv_policy that can be honoured: only the engine can tell."""

    id: str


class Logprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities under the model itself, before temperature, penalties and bias."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []  # (token id, logprob), most likely first


class Token(msgspec.Struct, frozen=True, tag=True):
    """One generated token of one choice."""

    id: str
    index: int
    token: int
    logprobs: Logprobs | None = None


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """Sent once, before the first Token: entry i belongs to prompt token i + 1."""

    id: str
    entries: list[Logprobs]


class Done(msgspec.Struct, frozen=True, tag=True):
    """One choice ended. Seconds are measured by the engine."""

    id: str
    index: int
    reason: FinishReason
    stop_token: int | None = None  # the id that ended it: its Token was sent, its text is not part of the answer
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_preemptions: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The request ended without an answer. invalid: the caller's fault; capacity: never fits; engine: ours."""

    id: str
    kind: FailureKind
    message: str
    param: str | None = None  # the field of the request at fault, where one is


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Gauges as of now, and counters since the engine started (`*_total`)."""

    num_running: int = 0
    num_waiting: int = 0
    pages_used: int = 0  # held by sequences
    pages_cached: int = 0  # held by the prefix index alone: reusable, evictable
    pages_total: int = 0
    tokens_held: int = 0  # stored on pages that sequences hold; shared ones count once
    recent_pages_used: int = 0  # of RECENT_TOKENS tokens, held by sequences
    recent_pages_cached: int = 0  # held by the prefix index alone
    recent_pages_total: int = 0
    recent_tokens_held: int = 0  # stored on recent pages that sequences hold
    prefix_queries_total: int = 0  # prompt tokens looked up
    prefix_hits_total: int = 0  # prompt tokens found
    prefix_cut_total: int = 0  # prompt tokens whose pages were found in vain: the window that belongs to them is gone
    preemptions_total: int = 0
    swap_bytes_used: int = 0  # of preempted sequences, in host memory
    swaps_out_total: int = 0  # preemptions that kept their pages there
    swaps_in_total: int = 0
    swap_bytes_out_total: int = 0  # copied to the host
    swap_bytes_in_total: int = 0
    steps_total: int = 0
    batch_tokens_total: int = 0  # rows computed, prefill and decode
    step_seconds_total: float = 0.0


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of reading weights."""

    done_bytes: int
    total_bytes: int


class KernelUse(msgspec.Struct, frozen=True):
    """The kernel that equal layers run on."""

    what: str  # "112 x affine 4-bit g128"
    kernel: str
    refusals: str  # why faster ones do not run
    num_bytes: int = 0  # of these layers' weights, read once a step


class PlanSummary(msgspec.Struct, frozen=True):
    """What the engine decided, for the start screen, /v1/models and admission in the server."""

    model: str  # where it was loaded from
    architecture: str
    format: str  # "compressed-tensors 4-bit g64"
    device: str
    dtype: str  # of activations
    kernels: list[KernelUse]
    kv_policy: str
    page_size: int  # tokens
    num_pages: int
    kv_bytes_per_token: int  # of a page, all layers
    weight_bytes: int
    max_model_len: int  # tokens of one request, prompt and answer
    max_num_seqs: int
    max_batch_tokens: int
    prefix_caching: bool
    threads: int
    vocab_size: int
    load_seconds: float
    decode_tokens_per_s: float  # one sequence, measured at start
    eos_token_ids: tuple[int, ...] = ()
    kv_elements_per_token: int = 0  # numbers that keys and values consist of, all layers
    bytes_per_page: int = 0  # all layers
    bytes_per_recent_page: int = 0  # likewise
    num_recent_pages: int = 0  # of 16 tokens, beside the others: the window and sinks of a quantized cache
    kv_request_window: int = 0  # most tokens that a request may have in high precision by asking; 0: it may not ask
    kv_prefill: str = "windowed"  # or "exact": prompts attend in high precision throughout
    swap_bytes: int = 0  # of host memory, at most, for preempted sequences
    notes: tuple[str, ...] = ()  # what a user should know: limits that came from the model or from memory

    @property
    def recent_bytes(self) -> int:
        """Of the cache, for recent pages."""
        return self.num_recent_pages * self.bytes_per_recent_page

    @property
    def kv_bytes(self) -> int:
        """Of the whole cache, pages of both kinds."""
        return self.num_pages * self.bytes_per_page + self.recent_bytes

    @property
    def kv_bits(self) -> float:
        """Bits of a page for each number of keys and values, parameters included."""
        return 8 * self.kv_bytes_per_token / max(self.kv_elements_per_token, 1)


class SequenceMemory(msgspec.Struct, frozen=True):
    """What one sequence takes."""

    num_tokens: int
    page_bytes: int
    recent_bytes: int  # its window and sinks in high precision
    f16_bytes: int  # what the same tokens take in a float16 cache
    bits: float  # for each number of keys and values, all counted


class CacheMemory(msgspec.Struct, frozen=True):
    """A KV cache beside one of float16."""

    bits: float  # of a page, parameters included
    num_bytes: int  # pages and recent pages
    num_tokens: int  # that fit
    num_f16_tokens: int  # that would fit in as many bytes in float16
    f16_bytes_per_token: int
    break_even_tokens: int  # the length below which a sequence takes no less than in float16
    sequences: list[SequenceMemory]  # at some lengths


class Inspection(msgspec.Struct, frozen=True):
    """A model on this machine: what a decode step must read, how fast that can be read, and what was measured."""

    plan: PlanSummary
    weight_bytes_per_token: int
    bandwidth: float | None  # bytes per second that the plan's threads can read; None without the C++ kernels
    isa: str | None  # instruction set of the C++ kernels
    kv: CacheMemory

    def predicted_tokens_per_s(self, context_len: int) -> float | None:
        """One sequence with `context_len` tokens in the cache, were reading all there is to do."""
        if self.bandwidth is None:
            return None
        return self.bandwidth / (self.weight_bytes_per_token + context_len * self.plan.kv_bytes_per_token)


class ConversionSettings(msgspec.Struct, frozen=True):
    """What a user asks of a conversion."""

    scheme: str | None  # "rtn:b4:g64"; None recovers exact codes
    keep: tuple[str, ...] = ()  # regular expressions of layers that stay as they are


class ConvertedLayer(msgspec.Struct, frozen=True):
    """What became of one linear layer."""

    name: str
    what: str  # "4-bit g64"; "kept"
    num_weights: int
    num_bytes: int  # in the new checkpoint, without its bias
    error: float  # |W' - W| / |W|, Frobenius; 0 when every weight is the same in the checkpoint's own dtype

    @property
    def bits(self) -> float:
        """Of one weight, everything counted."""
        return 8 * self.num_bytes / self.num_weights


class Conversion(msgspec.Struct, frozen=True):
    """A finished conversion."""

    source: str
    destination: str
    made_by: str
    layers: list[ConvertedLayer]
    source_bytes: int  # of all tensors
    num_bytes: int  # likewise
    num_shards: int
    num_resumed: int  # shards that an earlier, interrupted run had finished


class CalibrationSettings(msgspec.Struct, frozen=True):
    """What a user asks of a calibration."""

    model: str  # a folder
    data: str  # a text file
    policy: str
    out: str | None = None  # None: beside the checkpoint
    num_tokens: int = 16384  # of the text, at most


class CalibratedLayer(msgspec.Struct, frozen=True):
    """What the search chose for one layer. Errors are those of attention outputs, |o' - o|^2 / |o|^2, held out."""

    widths: str  # "k2v2"
    keys: str  # what is done to heads before they are quantized: "scaled hadamard"
    values: str
    key_clip: float  # mean over heads and groups
    value_clip: float
    error_before: float  # of an uncalibrated cache
    error_after: float


class CalibrationReport(msgspec.Struct, frozen=True):
    """A finished calibration."""

    artifact: str
    policy: str
    digest: str
    provenance: str
    num_tokens: int
    seconds: float
    layers: list[CalibratedLayer]
    wider: str | None = None  # a policy with more bits for keys of the few layers that have most of the error


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and the engine takes requests."""

    plan: PlanSummary


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start; the message says what to do. The process ends after sending it."""

    message: str


Inbound = Submit | Cancel | Shutdown
Event = Accepted | Token | PromptLogprobs | Done | Failed
Outbound = Accepted | Token | PromptLogprobs | Done | Failed | Stats | Loading | Ready | StartFailed
