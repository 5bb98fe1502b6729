"""Whether what formats do to activations is right on a GPU, for benchmarks.gpu_check: roundings, Hadamard blocks and
rotations by blocks, against the same on the CPU."""

from collections.abc import Iterator

import torch

from benchmarks.gpu_errors import Checked, differing, placed, worst
from benchmarks.shapes import Shape
from kernels.gpu.transforms import LONGEST_HADAMARD, BlockRotationTriton, HadamardTriton, RoundingTriton
from kernels.linear.rounding import Rounding
from kernels.linear.transforms import BlockRotation, Hadamard
from tests.kernels.interpreted_families import RULES, activations
from tests.tolerance import EPS

EPS_BF16 = torch.finfo(torch.bfloat16).eps
NUM_ROWS = 18  # more than a tile of rotations has


def check_transforms(shape: Shape, device: torch.device) -> Iterator[Checked]:
    """Roundings and Hadamard blocks to the last bit, from small to large tokens."""
    x = activations(NUM_ROWS, shape.intermediate)
    x = x * torch.exp2(torch.linspace(-20, 20, NUM_ROWS)).bfloat16().unsqueeze(1)
    for name, rule in RULES.items():
        rounding = Rounding(**rule)
        fast = RoundingTriton(**vars(placed(rounding, device)))
        yield f"rounding {name}", differing(fast.apply(x.to(device)), rounding.apply(x))
    longest = min(LONGEST_HADAMARD, shape.intermediate & -shape.intermediate)
    for block in (2, 64, longest):
        yield f"hadamard {block}", differing(HadamardTriton(block).apply(x.to(device)), Hadamard(block).apply(x))
    for num_matrices, size in ((1, 64), (shape.hidden // 32, 32), (2, shape.hidden // 2)):
        yield f"rotation, {num_matrices} of {size}", rotation_error(num_matrices, size, shape.hidden, device)


def rotation_error(num_matrices: int, size: int, width: int, device: torch.device) -> float:
    """The bound of the tests (tests/kernels/interpreted_families.py), and the result rounded once more."""
    x, random = activations(NUM_ROWS, width), torch.Generator().manual_seed(size)
    matrices = torch.randn(num_matrices, size, size, generator=random)
    found = BlockRotationTriton(matrices.to(device)).apply(x.to(device)).cpu()
    expected = BlockRotation(matrices).apply(x.float())
    runs, squares = x.double().view(NUM_ROWS, -1, size).square(), matrices.double().square()
    sizes = torch.einsum("rij,trj->tri", squares.expand(width // size, size, size), runs).sqrt().flatten(1)
    return worst(found, expected, 8 * EPS * size**0.5 * sizes + EPS_BF16 * expected.abs())
