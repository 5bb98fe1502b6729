"""The low-rank family in C++: two float products in one fixed order (kernels/native/dense.hpp)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.joined import Joined, float_type, multiply
from kernels.linear.lowrank.layout import LowRankWeights

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


@dataclass(frozen=True)
class Pair:
    """Both factors, each packed as a dense matrix."""

    a: "_native.DenseMatrix"  # [N, r]
    b: "_native.DenseMatrix"  # [r, K]

    @property
    def num_bytes(self) -> int:
        return self.a.num_bytes + self.b.num_bytes


@dataclass(frozen=True)
class JoinedPairs:
    """All first factors read the same input and go in one pass; each second one reads what its first gave."""

    first: Joined
    second: tuple[Joined, ...]


class LowRankNative:
    """y[t, n] = sum_r a[n, r] * (sum_k b[r, k] * x[t, k]),  both sums in blocks of 256, in order, in float32

    A result is the same to the last bit for any batch, any number of threads and any instruction set. Activations are
    not rounded. Reads num_bytes of weights once for up to 6 tokens; 2 T r (N + K) operations.
    """

    name = "native"

    def refuses(self, spec: LinearSpec) -> str | None:
        return native.refusal(spec.device, spec.dtype)

    def prepare(self, weights: LowRankWeights) -> Pair:
        """Repack into panels of 64 rows, of the dtype they are stored in; the tensors are not kept."""
        return Pair(_pack(weights.a), _pack(weights.b))

    def join(self, prepared: Sequence[Pair]) -> JoinedPairs | None:
        """None when the matrices read different numbers of channels."""
        if len({pair.b.num_channels for pair in prepared}) != 1:
            return None
        return JoinedPairs(_group([pair.b for pair in prepared]), tuple(_group([pair.a]) for pair in prepared))

    def linear(self, x: Tensor, joined: JoinedPairs) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix."""
        inner = multiply(x, joined.first)
        return tuple(multiply(t, second)[0] for t, second in zip(inner, joined.second, strict=True))


def _pack(factor: Tensor) -> "_native.DenseMatrix":
    matrix = factor.contiguous()
    return _native.pack_dense(matrix.data_ptr(), float_type(matrix), matrix.shape[0], matrix.shape[1])


def _group(matrices: "list[_native.DenseMatrix]") -> Joined:
    rows = tuple(matrix.num_rows for matrix in matrices)
    return Joined(_native.DenseGroup(matrices), matrices[0].num_channels, rows)
