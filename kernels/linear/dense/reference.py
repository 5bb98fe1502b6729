"""The definition of the dense family: multiply in float32."""

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

    def linear(self, x: Tensor, prepared: DenseWeights) -> Tensor:
        """x: [num_tokens, K] -> [num_tokens, N], x's dtype."""
        weight = prepared.weight  # [N, K]
        return multiply_by_blocks(x, (weight.shape[0], weight.shape[1]), lambda start, stop: weight[start:stop].float())
