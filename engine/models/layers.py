"""The layers of every model: weights bound to the kernels that were chosen for them at load.

A model file sees only these; which family, which back end and which cache codec stand behind a layer is decided in
engine/loading.py. Layers keep no state between calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.rope import RopeConfig, inverse_frequencies
from kernels.attention.quantized.cache import QuantizedKernel
from kernels.contract import (
    ActivationKernel,
    AttentionInputs,
    AttentionKernel,
    LinearKernel,
    NormKernel,
    RopeKernel,
    RotatingKernel,
)
from kernels.linear.transforms import Transform, same


@dataclass(frozen=True)
class BoundTerm:
    """One term of a linear layer, repacked by the kernel that multiplies it."""

    kernel: LinearKernel
    prepared: Any  # what kernel.prepare returned


@dataclass(frozen=True)
class Finish:
    """What a linear layer does to the sum of its terms."""

    post: tuple[Transform, ...]
    bias: Tensor | None  # [out_features] of the activations' dtype

    def __call__(self, y: Tensor) -> Tensor:
        """y: [num_tokens, out_features] -> what the layer gives."""
        for transform in self.post:
            y = transform.apply(y)
        return y if self.bias is None else y + self.bias


class Linear:
    """y = Post(sum_t Term_t(Pre(x))) + bias."""

    def __init__(
        self,
        terms: Sequence[BoundTerm],
        pre: Sequence[Transform],
        bias: Tensor | None,
        post: Sequence[Transform] = (),
    ) -> None:
        self.terms = tuple(terms)
        self.pre = tuple(pre)
        self.finish = Finish(tuple(post), bias)
        self._joined = [term.kernel.join([term.prepared]) for term in terms]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features], x's dtype."""
        for transform in self.pre:
            x = transform.apply(x)
        results = [term.kernel.linear(x, joined)[0] for term, joined in zip(self.terms, self._joined, strict=True)]
        y = results[0]  # [num_tokens, out_features]
        for other in results[1:]:
            y = y + other
        return self.finish(y)


class Projections:
    """Linear layers that read the same input (q, k and v; gate and up), in one pass where their kernels can."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        joined = _join(linears)
        self._together = None if joined is None else (linears[0].pre, linears[0].terms[0].kernel, joined)
        self._finishes = tuple(linear.finish for linear in linears)
        self._linears = tuple(linears) if joined is None else ()  # else their matrices go: what is joined may be a copy

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [num_tokens, in_features] -> [num_tokens, out_features] of each layer, x's dtype."""
        if self._together is None:
            return tuple(linear(x) for linear in self._linears)
        pre, kernel, joined = self._together
        for transform in pre:
            x = transform.apply(x)
        return tuple(finish(y) for finish, y in zip(self._finishes, kernel.linear(x, joined), strict=True))


def _join(linears: Sequence[Linear]) -> Any | None:
    """What the layers' kernel takes to multiply them together; None when they are of several kernels or inputs."""
    first = linears[0]
    for linear in linears:
        if len(linear.terms) != 1 or linear.terms[0].kernel is not first.terms[0].kernel:
            return None
        if not same(linear.pre, first.pre):
            return None
    return first.terms[0].kernel.join([linear.terms[0].prepared for linear in linears])


class FusedProjections:
    """Layers that the checkpoint holds as one, whose outputs stand one after the other (QuIP#)."""

    def __init__(self, linear: Linear, outputs: Sequence[slice]) -> None:
        self._linear = linear
        self._outputs = tuple(outputs)  # of each layer

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [num_tokens, in_features] -> [num_tokens, out_features] of each layer, x's dtype."""
        y = self._linear(x)
        return tuple(y[:, columns].contiguous() for columns in self._outputs)


class Embedding:
    """Row lookup in a [vocab_size, hidden_size] matrix, kept as it was stored.

    rows: ids [num_tokens] int64 -> [num_tokens, hidden_size] floating.
    """

    def __init__(self, rows: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        self._rows = rows
        self._dtype = dtype

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids: [num_tokens] -> [num_tokens, hidden_size] of the activations' dtype."""
        return self._rows(input_ids).to(self._dtype)


class RMSNorm:
    """RMSNorm over the last dimension."""

    def __init__(self, kernel: NormKernel, weight: Tensor, eps: float) -> None:
        self._kernel = kernel
        self._weight = weight  # [width] of the activations' dtype
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., width] -> the same shape and dtype."""
        return self._kernel.rms_norm(x, self._weight, self._eps)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x, delta: [..., width] -> (x + delta, its norm), in one pass where the kernel can."""
        return self._kernel.add_rms_norm(x, delta, self._weight, self._eps)


@dataclass(frozen=True)
class Rotation:
    """The angles of one step's rows, shared by all layers."""

    cos: Tensor  # [num_tokens, head_dim / 2] float32
    sin: Tensor  # [num_tokens, head_dim / 2] float32


class Rope:
    """Positions to angles, and angles to turned heads."""

    def __init__(self, kernel: RopeKernel, config: RopeConfig, device: torch.device) -> None:
        self._kernel = kernel
        self._inv_freq = inverse_frequencies(config).to(device)  # [head_dim / 2] float32
        self._scale = config.attention_factor

    def angles(self, positions: Tensor) -> Rotation:
        """positions: [num_tokens] int64."""
        radians = positions.float().unsqueeze(1) * self._inv_freq  # [num_tokens, head_dim / 2]
        return Rotation(radians.cos() * self._scale, radians.sin() * self._scale)

    def rotate(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """q, k: [num_tokens, heads, head_dim] of their own -> the same shapes and dtype."""
        return self._kernel.rotate_pair(q, k, rotation.cos, rotation.sin)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over the paged cache; queries and keys may be normalized head by head."""

    qkv_proj: Projections | FusedProjections
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    rope: Rope
    kernel: AttentionKernel | QuantizedKernel
    head_dim: int

    def __call__(self, x: Tensor, rotation: Rotation, cache: Any, inputs: AttentionInputs) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape. Stores the rows' keys and values in `cache`, which is what
        the kernel takes."""
        num_tokens = x.shape[0]
        # [num_tokens, num_heads, head_dim], and twice [num_tokens, num_kv_heads, head_dim]
        q, k, v = (y.view(num_tokens, -1, self.head_dim) for y in self.qkv_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(self.kernel, RotatingKernel):
            q = self.kernel.rotate_and_store(q, k, v, (rotation.cos, rotation.sin), cache, inputs)
        else:
            q, k = self.rope.rotate(q, k, rotation)
            self.kernel.store(k, v, cache, inputs)
        attended = self.kernel.attend(q, cache, inputs, self.head_dim**-0.5)  # [num_tokens, num_heads, head_dim]
        return self.o_proj(attended.flatten(1))


@dataclass(frozen=True)
class MLP:
    """down(silu(gate(x)) * up(x))."""

    gate_up_proj: Projections | FusedProjections
    down_proj: Linear
    kernel: ActivationKernel

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape and dtype."""
        return self.down_proj(self.kernel.swiglu(*self.gate_up_proj(x)))


class Parts(Protocol):
    """Where a model gets its layers; names are those of the checkpoint. Every method may raise on a bad tensor."""

    def linear(self, name: str, shape: tuple[int, int], bias: bool) -> Linear:
        """The layer called `name`; shape is (out_features, in_features)."""
        ...

    def projections(self, layers: Sequence[tuple[str, tuple[int, int]]], bias: bool) -> Projections | FusedProjections:
        """Layers that read the same input, by name and shape."""
        ...

    def norm(self, name: str, width: int, eps: float) -> RMSNorm: ...

    def embedding_and_head(self, embedding: str, head: str, config: ModelConfig) -> tuple[Embedding, Linear]:
        """The embedding and the output head, which may be one matrix under either name."""
        ...

    def rope(self, config: ModelConfig) -> Rope: ...

    def attention_kernel(self, config: ModelConfig, layer: int) -> AttentionKernel | QuantizedKernel:
        """Layers may keep keys and values in different precisions."""
        ...

    def activation_kernel(self, config: ModelConfig) -> ActivationKernel: ...
