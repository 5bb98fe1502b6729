"""The definition of the rotary position embedding, in the "rotate half" pairing of Hugging Face checkpoints."""

import torch
from torch import Tensor

from kernels.contract import RowSpec
from kernels.rope.checks import check_heads


class RopeReference:
    """Channels i and i + D/2 of a head turn together by angle[i]:

        y[i]       = x[i] cos[i] - x[i + D/2] sin[i]
        y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]

    in float32, rounded once to x's dtype. Reads and writes x once: 2 * 4 bytes and 3 operations an element.
    """

    name = "reference"

    def refuses(self, spec: RowSpec) -> str | None:
        return None

    def rotate_pair(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q: [num_tokens, heads, D]; k: [num_tokens, kv_heads, D]; cos, sin: [num_tokens, D / 2] float32."""
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [num_tokens, heads, D] -> x's shape and dtype."""
    check_heads(x, cos, sin)
    low, high = x.float().chunk(2, dim=-1)  # each [num_tokens, heads, D / 2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [num_tokens, 1, D / 2]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
