"""The definition of the lookup family: dequantize, then multiply in float32."""

from collections.abc import Sequence

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.linear.blocks import multiply_by_blocks
from kernels.linear.lookup.layout import LookupWeights


class LookupReference:
    """y[t, n] = sum_k x[t, k] * table[n, k // G, code[n, k]],  accumulated in float32.

    Reads num_bytes of weights and 4 T (N + K) bytes of activations; N K look-ups to dequantize and 2 T N K operations
    to multiply.
    """

    name = "reference"

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weights: LookupWeights) -> LookupWeights:
        return weights

    def join(self, prepared: Sequence[LookupWeights]) -> tuple[LookupWeights, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[LookupWeights, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] -> [num_tokens, N] of each matrix, x's dtype."""
        return tuple(multiply_by_blocks(x, (w.out_features, w.in_features), w.dequantize_rows) for w in joined)
