"""The definition of the int8 family: round the activations, dequantize the weights, multiply in float32."""

from collections.abc import Sequence

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.linear.blocks import check_width, multiply_by_blocks
from kernels.linear.int8.layout import Int8Weights


class Int8Reference:
    """y[t, n] = sum_k x^[t, k] * scale[n, k // G] * (weight[n, k] - zero[n, k // G]),   x^ = rounding(x)

    accumulated in float32. Reads num_bytes of weights and 4 T (N + K) bytes of activations; 2 N K operations to
    dequantize and 2 T N K to multiply.
    """

    name = "reference"

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weights: Int8Weights) -> Int8Weights:
        return weights

    def join(self, prepared: Sequence[Int8Weights]) -> tuple[Int8Weights, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[Int8Weights, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] -> [num_tokens, N] of each matrix, x's dtype."""
        for w in joined:
            check_width(x, w.in_features)
        return tuple(
            multiply_by_blocks(w.rounding.apply(x.float()), (w.out_features, w.in_features), w.dequantize_rows).to(
                x.dtype
            )
            for w in joined
        )
