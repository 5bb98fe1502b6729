"""The definition of the affine family: dequantize, then multiply in float32."""

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.blocks import multiply_by_blocks


class AffineReference:
    """y[t, n] = sum_k x[t, k] * scale[n, k // G] * (code[n, k] - zero[n, k // G]),  accumulated in float32.

    Reads num_bytes of weights and 4 T (N + K) bytes of activations; 2 N K operations to dequantize and 2 T N K to
    multiply.
    """

    name = "reference"

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weights: AffineWeights) -> AffineWeights:
        return weights

    def linear(self, x: Tensor, prepared: AffineWeights) -> Tensor:
        """x: [num_tokens, K] -> [num_tokens, N], x's dtype."""
        return multiply_by_blocks(x, (prepared.out_features, prepared.in_features), prepared.dequantize_rows)
