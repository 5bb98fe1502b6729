"""The definition of the low-rank family: two products in float32."""

from collections.abc import Sequence

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.linear.blocks import multiply_by_blocks
from kernels.linear.lowrank.layout import LowRankWeights


class LowRankReference:
    """y[t, n] = sum_r a[n, r] * (sum_k b[r, k] * x[t, k]),  both sums accumulated in float32 and the inner one kept so.

    Reads num_bytes of weights and 4 T (N + K) bytes of activations; 2 T r (N + K) operations.
    """

    name = "reference"

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weights: LowRankWeights) -> LowRankWeights:
        return weights

    def join(self, prepared: Sequence[LowRankWeights]) -> tuple[LowRankWeights, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[LowRankWeights, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] -> [num_tokens, N] of each matrix, x's dtype."""
        return tuple(_multiply(x, weights).to(x.dtype) for weights in joined)


def _multiply(x: Tensor, weights: LowRankWeights) -> Tensor:
    inner = multiply_by_blocks(x.float(), (weights.rank, weights.in_features), weights.b_rows)  # [num_tokens, r]
    return multiply_by_blocks(inner, (weights.out_features, weights.rank), weights.a_rows)
