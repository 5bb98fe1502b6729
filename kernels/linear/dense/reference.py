"""The definition of the dense family: multiply in float32."""

from collections.abc import Sequence

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.linear.blocks import multiply_by_blocks
from kernels.linear.dense.layout import DenseWeights


class DenseReference:
    """y[t, n] = sum_k x[t, k] * w[n, k],  accumulated in float32.

    Reads num_bytes of weights and 4 T (N + K) bytes of activations; 2 T N K operations.
    """

    name = "reference"

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weights: DenseWeights) -> DenseWeights:
        return weights

    def join(self, prepared: Sequence[DenseWeights]) -> tuple[DenseWeights, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[DenseWeights, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] -> [num_tokens, N] of each matrix, x's dtype."""
        return tuple(multiply_by_blocks(x, (w.out_features, w.in_features), w.dequantize_rows) for w in joined)
