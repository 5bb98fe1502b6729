"""The dense family on NVIDIA GPUs: cuBLAS (kernels/gpu/library.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu import library
from kernels.linear.blocks import check_width
from kernels.linear.dense.layout import DenseWeights


@dataclass(frozen=True)
class Prepared:
    """One matrix."""

    weight: Tensor  # [N, K] bfloat16

    @property
    def num_bytes(self) -> int:
        return 2 * self.weight.numel()


class DenseCublas:
    """y[t, n] = sum_k x[t, k] * bf16(w[n, k]),  accumulated in float32, rounded to bfloat16

    Weights in bfloat16 are taken as they are; those of 16 and 32 bits lose 3 and 16 bits of their fraction. A product
    of wider floats would read more, and run at half the speed or a sixteenth.

    Reads 2 N K bytes of weights and 2 T (N + K) of activations; 2 T N K operations on tensor cores. With `fixed` the
    weights are read once for every 16 tokens.
    """

    def __init__(self, fixed: bool = False) -> None:
        self._fixed = fixed
        self.name = library.name_of(fixed)

    def refuses(self, spec: LinearSpec) -> str | None:
        return library.refusal(spec)

    def prepare(self, weights: DenseWeights) -> Prepared:
        return Prepared(library.matrix(weights.weight))

    def join(self, prepared: Sequence[Prepared]) -> tuple[Prepared, ...]:
        """Matrices run one after the other: one product for all would need a copy of them."""
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[Prepared, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] bfloat16 -> [num_tokens, N] bfloat16 for each matrix. Raises ValueError for another K."""
        for one in joined:
            check_width(x, one.weight.shape[1])
        return tuple(library.multiply(x, one.weight, self._fixed) for one in joined)
