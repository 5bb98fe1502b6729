"""What every back end of SwiGLU refuses: a gate of another shape than what it gates."""

from torch import Tensor


def check_gate(gate: Tensor, up: Tensor) -> None:
    """Raise ValueError, naming the shapes, when they differ."""
    if gate.shape != up.shape:
        raise ValueError(f"a gate of {list(gate.shape)} cannot gate {list(up.shape)}")
