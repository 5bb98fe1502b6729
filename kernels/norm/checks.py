"""What every back end of RMSNorm refuses: rows of another width than the weight's, two addends of different shapes."""

from torch import Tensor


def check_rows(x: Tensor, weight: Tensor, delta: Tensor | None = None) -> None:
    """Raise ValueError, naming the shapes, unless x is [..., width], weight [width], and delta like x."""
    if weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"rows of {list(x.shape)} cannot be scaled by a weight of {list(weight.shape)}")
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"{list(delta.shape)} cannot be added to {list(x.shape)} row by row")
