"""The rotary position embedding in C++ (kernels/native/rows.cpp)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import native
from kernels.contract import RowSpec
from kernels.native.checks import check_memory
from kernels.rope.checks import check_heads

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native


class RopeNative:
    """Channels i and i + D/2 of a head turn together by angle[i]:

        y[i]       = x[i] cos[i] - x[i + D/2] sin[i]
        y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]

    in float32, the second product and the sum rounded once. Reads and writes x once: 2 * 4 bytes and 3 operations an
    element.
    """

    name = "native"

    def refuses(self, spec: RowSpec) -> str | None:
        return native.refusal(spec.device, spec.dtype)

    def rotate_pair(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q: [num_tokens, heads, D]; k: [num_tokens, kv_heads, D]; cos, sin: [num_tokens, D / 2]; all float32."""
        check_heads(q, cos, sin)
        check_heads(k, cos, sin)
        check_memory("queries", q)
        check_memory("keys", k)
        check_memory("cosines", cos)
        check_memory("sines", sin)
        q, k, cos, sin = q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous()
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        num_tokens, num_heads, head_dim = q.shape
        _native.rotate(
            (q.data_ptr(), q_out.data_ptr()),
            num_heads,
            (k.data_ptr(), k_out.data_ptr()),
            k.shape[1],
            cos.data_ptr(),
            sin.data_ptr(),
            num_tokens,
            head_dim,
        )
        return q_out, k_out
