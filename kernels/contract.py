"""What a kernel promises: the specs it is asked about, the verbs it offers, and how one is chosen.

A *family* (``affine``, ``dense``, ...) has one weight layout and several back ends ("reference", "native",
"triton"). A back end says whether it can serve a spec (``refuses``), repacks weights once (``prepare``), binds
matrices that read the same input (``join``) and then runs (``linear``). ``select`` picks the first back end that does
not refuse; nothing falls back silently.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor


class KernelRefused(ValueError):
    """The kernel a user asked for by name cannot serve the layer; the message carries every reason."""


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer as a kernel sees it before its weights are read."""

    in_features: int
    out_features: int
    device: torch.device
    dtype: torch.dtype  # of the activations
    detail: str = ""  # what the weights are, for logs and refusals: "4-bit g64"
    bits: int = 0  # of a code or an element; 0 when not known
    group_size: int = 0  # channels that share a scale; in_features for a whole row
    exact_activations: bool = False  # whether the kernel must not round activations

    def __str__(self) -> str:
        article = "an" if self.detail[:1] in ("8", "i", "a") else "a"  # 8-bit, int8
        return f"{article} {self.detail} linear layer of {self.out_features} x {self.in_features} on {self.device.type}"


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer as a kernel sees it: heads, head size, page size and where it runs."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    device: torch.device
    dtype: torch.dtype  # of the activations
    cache_dtype: torch.dtype  # of the pages

    def __str__(self) -> str:
        return f"attention with {self.num_heads}/{self.num_kv_heads} heads of {self.head_dim} on {self.device.type}"


@dataclass(frozen=True)
class RowSpec:
    """An op on rows (norm, RoPE, the gate of an MLP) as a kernel sees it."""

    width: int  # of a row
    device: torch.device
    dtype: torch.dtype  # of the activations


class Kernel(Protocol):
    """The part every back end of every op shares."""

    @property
    def name(self) -> str:
        """ "reference", "native" or "triton"."""
        ...

    def refuses(self, spec: Any) -> str | None:
        """Return why this back end cannot serve `spec`, or None when it can. Never raises."""
        ...


KernelT = TypeVar("KernelT", bound=Kernel)


class LinearKernel(Kernel, Protocol):
    """One back end of one weight family."""

    def prepare(self, weights: Any) -> Any:
        """Repack canonical weights for this back end, once, at load. The result has `num_bytes`, read once a step."""
        ...

    def join(self, prepared: Sequence[Any]) -> Any | None:
        """Return what `linear` takes for matrices that read the same input; None when they must go one by one.

        One matrix can always be joined with itself alone. The result needs nothing of what was prepared that it does
        not hold: it may be a copy.
        """
        ...

    def linear(self, x: Tensor, joined: Any) -> tuple[Tensor, ...]:
        """Return x @ W^T for each joined matrix W, in order.

        x: [num_tokens, in_features]; each result [num_tokens, out_features] of its matrix, x's dtype. Raises
        ValueError, naming both, when x is not as wide as the matrices.
        """
        ...


@dataclass(frozen=True)
class RecentInputs:
    """Where the rows of one step stand in the recent pages of a quantized cache (kernels/attention/quantized)."""

    tables: Tensor  # [num_seqs, max_recent_pages] int64, a recent page id for each 16 positions, -1 where there is none
    slots: Tensor  # [num_tokens] int64, recent page id * 16 + offset, -1 for rows that are not kept
    windows: tuple[int | None, ...]  # [num_seqs] tokens that each sequence reads from here; None: what the codec says


@dataclass(frozen=True)
class AttentionInputs:
    """Where the rows of one step stand in the paged cache; the same for every layer.

    Sequence i owns query rows ``query_starts[i] : query_starts[i + 1]``; they are its last positions, so row r of the
    sequence has position ``context_lens[i] - num_rows_i + r`` and reads keys 0..position.
    """

    query_starts: tuple[int, ...]  # [num_seqs + 1]
    context_lens: tuple[int, ...]  # [num_seqs] tokens in the cache once this step's rows are stored
    block_tables: Tensor  # [num_seqs, max_pages] int64, page ids; rows padded with 0
    slots: Tensor  # [num_tokens] int64, page id * page_size + offset, where each row's key and value go
    recent: RecentInputs | None = None  # None where no row of the step is read in high precision beside its page
    prepared: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)  # by back ends, once


class AttentionKernel(Kernel, Protocol):
    """One back end of one cache codec."""

    def store(self, k: Tensor, v: Tensor, pages: Tensor, inputs: AttentionInputs) -> None:
        """Write this step's keys and values. k, v: [num_tokens, num_kv_heads, head_dim]; mutates `pages`."""
        ...

    def attend(self, q: Tensor, pages: Tensor, inputs: AttentionInputs, scale: float) -> Tensor:
        """Causal attention of q: [num_tokens, num_heads, head_dim] over the pages; result has q's shape and dtype."""
        ...


@runtime_checkable
class RotatingKernel(Protocol):
    """What a back end of a cache offers beside `store` where it makes one launch of that and RoPE."""

    def rotate_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor], cache: Any, inputs: AttentionInputs
    ) -> Tensor:
        """RopeKernel.rotate_pair by angles (cos, sin), `store` of the turned keys; returns the turned queries."""
        ...


class NormKernel(Kernel, Protocol):
    """One back end of RMSNorm."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: [..., width], weight: [width] of x's dtype -> x's shape and dtype. Raises ValueError on another width."""
        ...

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return (x + delta, its norm): the residual stream and what the next layer reads. delta has x's shape."""
        ...


class RopeKernel(Kernel, Protocol):
    """One back end of the rotary position embedding."""

    def rotate_pair(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys turned, each in its own shape and dtype.

        q: [num_tokens, heads, D]; k: [num_tokens, kv_heads, D]; cos, sin: [num_tokens, D / 2] float32. Raises
        ValueError, naming the shapes, when they disagree.
        """
        ...


class ActivationKernel(Kernel, Protocol):
    """One back end of SwiGLU."""

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [num_tokens, width] -> silu(gate) * up, likewise. Raises ValueError when the shapes differ."""
        ...


@dataclass(frozen=True)
class Filters:
    """What cuts the tail of a distribution before a draw."""

    temperature: float  # above 0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 0 to 1
    min_p: float = 0.0  # 0 to 1


class SamplingKernel(Kernel, Protocol):
    """One back end of what is computed from one row of logits, [vocab] float32, with ties broken by the lower id."""

    def argmax(self, logits: Tensor) -> int | None:
        """The id of the largest; None when one is NaN or the largest is not finite."""
        ...

    def draw(self, logits: Tensor, filters: Filters, uniform: float) -> int:
        """The id that `uniform`, in [0, 1), picks. The largest logit must be finite, none NaN."""
        ...

    def log_probs(self, logits: Tensor, token: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
        """The log softmax of `token`, and (id, log softmax) of the `num_top` most likely ids, falling."""
        ...


@dataclass(frozen=True)
class Last:
    """The last token before a draw, where the step before draws it and only the device knows it. It is edited further:
    its factor is `factor` and, unless nothing is left of it, less = presence + frequency n, n times in the answer."""

    place: int  # among the ids of the step before
    factor: float
    presence: float
    frequency: float


@dataclass(frozen=True)
class Edits:
    """What is done to some logits of a row before anything is drawn from it, each step rounded to float32:

    x'[id] = scaled(x[id] + add) - less,   scaled(y) = y / factor where y > 0, else y * factor
    """

    ids: Tensor  # [n] int64, each id once
    terms: Tensor  # [3, n] float32: add, factor (1 scales nothing), less (inf leaves nothing of a finite logit)
    counts: Tensor  # [n] float32, how often each id is in the answer, but for `last`
    last: Last | None = None

    def of(self, values: Tensor) -> Tensor:
        """values: [n] float32, the logits of `ids` -> what becomes of them, but for what `last` does."""
        add, factor, less = self.terms.unbind()
        moved = values + add
        return torch.where(moved > 0, moved / factor, moved * factor) - less


@dataclass(frozen=True)
class RowDraw:
    """One id to draw from one row of a step's logits."""

    row: int
    filters: Filters | None  # None takes the largest
    uniform: float = 0.0  # in [0, 1)
    edits: Edits | None = None  # of the row before the draw, which leave the row itself as it is


@dataclass(frozen=True)
class Scores:
    """Log softmax of one token of each of n rows, and of each row's most likely ids, falling."""

    ids: Tensor  # [n, 1 + num_top] int64, the token first; -1 there is left to a SamplingKernel
    values: Tensor  # [n, 1 + num_top] float64


class StepSamplingKernel(Kernel, Protocol):
    """One back end that draws for a whole step, where its logits are; what is drawn is as SamplingKernel has it. It
    waits for nothing: what it returns may not be computed yet."""

    def draw_all(self, logits: Tensor, draws: Sequence[RowDraw], before: Tensor | None = None) -> Tensor:
        """logits: [num_rows, vocab] float32 -> [num_draws] int32, on their device; -1 is left to a SamplingKernel.
        before: what the step before drew, likewise, where a draw's edits have a `last`."""
        ...

    def score_all(self, logits: Tensor, pairs: Sequence[tuple[int, int]], tokens: Tensor, num_top: int) -> Scores:
        """What SamplingKernel.log_probs gives. pairs: a row, and where its token is among `tokens`, which are integers
        on the logits' device, below 0 where there is none."""
        ...


@dataclass(frozen=True)
class Choice(Generic[KernelT]):
    """The back end that will run, and why the faster ones will not."""

    kernel: KernelT
    refusals: tuple[str, ...]  # "name: reason", in order of preference

    def __str__(self) -> str:
        return self.kernel.name + (f" ({'; '.join(self.refusals)})" if self.refusals else "")


def select(kernels: Sequence[KernelT], spec: object, only: str | None = None) -> Choice[KernelT]:
    """Return the first of `kernels` (fastest first) that serves `spec`.

    `only` names the one back end the user insists on; its variants ("native-float" of "native") answer to it too.
    Raises KernelRefused, with every reason, when none is left.
    """
    names = [kernel.name for kernel in kernels]
    if only is not None and not any(_answers(name, only) for name in names):
        raise KernelRefused(f"there is no kernel {only!r} for {spec}; there is: {', '.join(names) or 'none'}")
    refusals: list[str] = []
    for kernel in kernels:
        reason = f"not the requested {only!r}" if only and not _answers(kernel.name, only) else kernel.refuses(spec)
        if reason is None:
            return Choice(kernel, tuple(refusals))
        refusals.append(f"{kernel.name}: {reason}")
    raise KernelRefused(f"no kernel serves {spec}: " + "; ".join(refusals))


def _answers(name: str, asked: str) -> bool:
    return name == asked or name.startswith(f"{asked}-")
