"""The rotary position embedding on NVIDIA GPUs, in Triton (kernels/gpu/rows.py)."""

import torch
from torch import Tensor

from kernels.contract import RowSpec
from kernels.gpu import refusal
from kernels.gpu.checks import check_memory
from kernels.rope.checks import check_heads

NUM_WARPS = 1


class RopeTriton:
    """Channels i and i + D/2 of a head turn together by angle[i]:

        y[i]       = x[i] cos[i] - x[i + D/2] sin[i]
        y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]

    in float32, rounded once to bfloat16. Reads and writes x once: 2 * 2 bytes and 3 operations an element, and 4 bytes
    of angles for each. Queries and keys go in one launch.
    """

    name = "triton"

    def refuses(self, spec: RowSpec) -> str | None:
        return refusal(spec.device, spec.dtype)

    def rotate_pair(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q: [num_tokens, heads, D]; k: [num_tokens, kv_heads, D], bfloat16; cos, sin: [num_tokens, D / 2] float32."""
        from kernels.gpu import rows

        check_heads(q, cos, sin)
        check_heads(k, cos, sin)
        check_memory("queries", q, q)
        check_memory("keys", k, q)
        check_memory("cosines", cos, q, torch.float32)
        check_memory("sines", sin, q, torch.float32)
        q, k, cos, sin = q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous()
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        num_tokens, num_heads, head_dim = q.shape
        if num_tokens:
            half, num_kv_heads = head_dim // 2, k.shape[1]
            rows.rotate_pair[num_tokens, num_heads + num_kv_heads](
                q, k, cos, sin, q_out, k_out, num_heads, num_kv_heads, half, BLOCK=block_for(half), num_warps=NUM_WARPS
            )
        return q_out, k_out


def block_for(half: int) -> int:
    """Channel pairs of a program, for heads of 2 * half channels."""
    return 1 << (half - 1).bit_length()
