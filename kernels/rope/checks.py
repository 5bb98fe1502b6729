"""What every back end of the rotary embedding refuses: tokens without angles, heads of another size than theirs."""

from torch import Tensor


def check_heads(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError, naming the shapes, unless x is [num_tokens, heads, D] and cos and sin [num_tokens, D / 2]."""
    if x.dim() != 3 or cos.shape != sin.shape or 2 * cos.shape[-1] != x.shape[2] or cos.shape[0] != x.shape[0]:
        raise ValueError(f"heads of {list(x.shape)} need angles of [num_tokens, D / 2], found {list(cos.shape)}")
