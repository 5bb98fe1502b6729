"""The definition of the sparse family: dequantize, then multiply in float32."""

from collections.abc import Sequence

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.linear.blocks import multiply_by_blocks
from kernels.linear.sparse.layout import SparseWeights


class SparseReference:
    """y[t, n] = sum_i x[t, column[i]] * value[i],  i the entries of row n,  accumulated in float32.

    Reads num_bytes of weights and 4 T (N + K) bytes of activations. Blocks of rows are filled in and multiplied as
    dense ones, 2 T N K operations: a definition, not a fast way.
    """

    name = "reference"

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weights: SparseWeights) -> SparseWeights:
        return weights

    def join(self, prepared: Sequence[SparseWeights]) -> tuple[SparseWeights, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[SparseWeights, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] -> [num_tokens, N] of each matrix, x's dtype."""
        return tuple(multiply_by_blocks(x, (w.out_features, w.in_features), w.dequantize_rows) for w in joined)
