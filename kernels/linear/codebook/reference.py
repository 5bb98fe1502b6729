"""The definition of the codebook family: dequantize, then multiply in float32."""

from collections.abc import Sequence

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.linear.blocks import multiply_by_blocks
from kernels.linear.codebook.layout import CodebookWeights


class CodebookReference:
    """y[t, n] = sum_k x[t, k] * book[code[n, k // d], k % d] * scale[n, k // G],  accumulated in float32.

    Reads num_bytes of weights and 4 T (N + K) bytes of activations; N K / d look-ups of d values and N K operations to
    dequantize, 2 T N K to multiply.
    """

    name = "reference"

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weights: CodebookWeights) -> CodebookWeights:
        return weights

    def join(self, prepared: Sequence[CodebookWeights]) -> tuple[CodebookWeights, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[CodebookWeights, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] -> [num_tokens, N] of each matrix, x's dtype."""
        return tuple(multiply_by_blocks(x, (w.out_features, w.in_features), w.dequantize_rows) for w in joined)
