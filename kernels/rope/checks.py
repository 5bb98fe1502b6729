"""What every back end of the rotary embedding refuses: tokens without angles, heads of another size than theirs."""

from torch import Tensor


def check_heads(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError, naming the shapes, unless x is [num_tokens, heads, D] and cos and sin [num_tokens, D / 2]."""
    fits = x.dim() == 3 and cos.dim() == 2 and 2 * cos.shape[1] == x.shape[2] and cos.shape[0] == x.shape[0]
    if not fits or cos.shape != sin.shape:
        found = f"{list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(f"heads of {list(x.shape)} need angles of [num_tokens, D / 2], found {found}")
