"""The low-rank family on NVIDIA GPUs: two products in cuBLAS (kernels/gpu/library.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.contract import LinearSpec
from kernels.gpu import library
from kernels.linear.blocks import check_width
from kernels.linear.lowrank.layout import LowRankWeights


@dataclass(frozen=True)
class Pair:
    """Both factors."""

    a: Tensor  # [N, r] bfloat16
    b: Tensor  # [r, K] bfloat16

    @property
    def num_bytes(self) -> int:
        return 2 * (self.a.numel() + self.b.numel())


class LowRankCublas:
    """y[t, n] = sum_r bf16(a[n, r]) * bf16(sum_k bf16(b[r, k]) * x[t, k]),  accumulated in float32, rounded to bfloat16

    Reads 2 r (N + K) bytes of weights and 2 T (N + K + 2 r) of activations; 2 T r (N + K) operations on tensor cores.
    """

    def __init__(self, fixed: bool = False) -> None:
        self._fixed = fixed
        self.name = library.name_of(fixed)

    def refuses(self, spec: LinearSpec) -> str | None:
        return library.refusal(spec)

    def prepare(self, weights: LowRankWeights) -> Pair:
        return Pair(library.matrix(weights.a), library.matrix(weights.b))

    def join(self, prepared: Sequence[Pair]) -> tuple[Pair, ...]:
        return tuple(prepared)

    def linear(self, x: Tensor, joined: tuple[Pair, ...]) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] bfloat16 -> [num_tokens, N] bfloat16 for each matrix. Raises ValueError for another K."""
        for pair in joined:
            check_width(x, pair.b.shape[1])
        return tuple(library.multiply(library.multiply(x, pair.b, self._fixed), pair.a, self._fixed) for pair in joined)
