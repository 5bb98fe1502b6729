"""The definition of the fp8 family: dequantize, then multiply in float32."""

from collections.abc import Sequence

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.linear.blocks import multiply_by_blocks
from kernels.linear.fp8.layout import Fp8Weights


class Fp8Reference:
    """y[t, n] = sum_k x[t, k] * weight[n, k] * scale[n // R, k // C],  accumulated in float32.

    Reads num_bytes of weights and 4 T (N + K) bytes of activations; 2 N K operations to dequantize and 2 T N K to
    multiply.
    """

    name = "reference"

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weights: Fp8Weights) -> Fp8Weights:
        return weights

    def join(self, prepared: Sequence[Fp8Weights]) -> tuple[Fp8Weights, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[Fp8Weights, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] -> [num_tokens, N] of each matrix, x's dtype."""
        return tuple(multiply_by_blocks(x, (w.out_features, w.in_features), w.dequantize_rows) for w in joined)
