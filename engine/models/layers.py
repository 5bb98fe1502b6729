"""The layers of every model: weights bound to the kernels that were chosen for them at load.

A model file sees only these; which family, which back end and which cache codec stand behind a layer is decided in
engine/loading.py. Layers keep no state between calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.rope import RopeConfig, inverse_frequencies
from kernels.contract import ActivationKernel, AttentionInputs, AttentionKernel, LinearKernel, NormKernel, RopeKernel
from kernels.linear.weights import Permutation


class BoundTerm:
    """One term of a linear layer, repacked by the kernel that multiplies it."""

    def __init__(self, kernel: LinearKernel, prepared: Any) -> None:
        """prepared: what kernel.prepare returned."""
        self._kernel = kernel
        self._joined = kernel.join([prepared])

    def __call__(self, x: Tensor) -> Tensor:
        (y,) = self._kernel.linear(x, self._joined)
        return y


class Linear:
    """y = sum_t Term_t(Pre(x)) + bias."""

    def __init__(self, terms: Sequence[BoundTerm], pre: Sequence[Permutation], bias: Tensor | None) -> None:
        self._first, *self._others = terms
        self._pre = tuple(pre)
        self._bias = bias  # [out_features] of the activations' dtype

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features], x's dtype."""
        for transform in self._pre:
            x = transform.apply(x)
        y = self._first(x)  # [num_tokens, out_features]
        for term in self._others:
            y = y + term(x)
        return y if self._bias is None else y + self._bias


class Embedding:
    """Row lookup in a [vocab_size, hidden_size] matrix, kept in the dtype it was stored in."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._weight = weight
        self._dtype = dtype

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids: [num_tokens] -> [num_tokens, hidden_size] of the activations' dtype."""
        return self._weight.index_select(0, input_ids).to(self._dtype)


class RMSNorm:
    """RMSNorm over the last dimension."""

    def __init__(self, kernel: NormKernel, weight: Tensor, eps: float) -> None:
        self._kernel = kernel
        self._weight = weight  # [width] of the activations' dtype
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., width] -> the same shape and dtype."""
        return self._kernel.rms_norm(x, self._weight, self._eps)


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

    def rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x: [num_tokens, heads, head_dim] -> the same shape and dtype."""
        return self._kernel.rotate(x, rotation.cos, rotation.sin)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over the paged cache; queries and keys may be normalized head by head."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    rope: Rope
    kernel: AttentionKernel
    head_dim: int

    def __call__(self, x: Tensor, rotation: Rotation, pages: Tensor, inputs: AttentionInputs) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape. Stores the rows' keys and values in `pages`."""
        num_tokens = x.shape[0]
        q = self.q_proj(x).view(num_tokens, -1, self.head_dim)  # [num_tokens, num_heads, head_dim]
        k = self.k_proj(x).view(num_tokens, -1, self.head_dim)  # [num_tokens, num_kv_heads, head_dim]
        v = self.v_proj(x).view(num_tokens, -1, self.head_dim)  # [num_tokens, num_kv_heads, head_dim]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rope.rotate(q, rotation), self.rope.rotate(k, rotation)
        self.kernel.store(k, v, pages, inputs)
        attended = self.kernel.attend(q, pages, inputs, self.head_dim**-0.5)  # [num_tokens, num_heads, head_dim]
        return self.o_proj(attended.flatten(1))


@dataclass(frozen=True)
class MLP:
    """down(silu(gate(x)) * up(x))."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    kernel: ActivationKernel

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size] -> the same shape and dtype."""
        return self.down_proj(self.kernel.swiglu(self.gate_proj(x), self.up_proj(x)))


class Parts(Protocol):
    """Where a model gets its layers; names are those of the checkpoint. Every method may raise on a bad tensor."""

    def linear(self, name: str, shape: tuple[int, int], bias: bool) -> Linear:
        """The layer called `name`; shape is (out_features, in_features)."""
        ...

    def norm(self, name: str, width: int, eps: float) -> RMSNorm: ...

    def embedding_and_head(self, embedding: str, head: str, config: ModelConfig) -> tuple[Embedding, Linear]:
        """The embedding and the output head, which may be one matrix under either name."""
        ...

    def rope(self, config: ModelConfig) -> Rope: ...

    def attention_kernel(self, config: ModelConfig) -> AttentionKernel: ...

    def activation_kernel(self, config: ModelConfig) -> ActivationKernel: ...
