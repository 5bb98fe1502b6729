"""The dense family in C++: float products in one fixed order (kernels/native/dense.hpp)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from kernels import native
from kernels.contract import LinearSpec
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.joined import Joined, float_type, multiply

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


class DenseNative:
    """y[t, n] = sum_b sum_{k in b} x[t, k] * w[n, k],  b blocks of 256 channels

    Both sums run in order in float32, so that a result is the same to the last bit for any batch, any number of threads
    and any instruction set. Activations are not rounded.

    Reads num_bytes of weights once for up to 6 tokens; 2 T N K operations.
    """

    name = "native"

    def refuses(self, spec: LinearSpec) -> str | None:
        return native.refusal(spec.device, spec.dtype)

    def prepare(self, weights: DenseWeights) -> "_native.DenseMatrix":
        """Repack into panels of 64 rows, of the dtype they are stored in; the tensor is not kept."""
        matrix = weights.weight.contiguous()
        return _native.pack_dense(matrix.data_ptr(), float_type(matrix), weights.out_features, weights.in_features)

    def join(self, prepared: "Sequence[_native.DenseMatrix]") -> Joined | None:
        """None when the matrices read different numbers of channels."""
        if len({matrix.num_channels for matrix in prepared}) != 1:
            return None
        rows = tuple(matrix.num_rows for matrix in prepared)
        return Joined(_native.DenseGroup(list(prepared)), prepared[0].num_channels, rows)

    def linear(self, x: Tensor, joined: Joined) -> tuple[Tensor, ...]:
        """x: [num_tokens, K] float32 -> [num_tokens, N] float32 for each matrix."""
        return multiply(x, joined)
