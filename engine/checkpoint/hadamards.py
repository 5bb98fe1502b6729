"""The Hadamard transforms of sizes that are no powers of two, as QuIP#, QuaRot and their heirs build them.

    H_n = (H_m kron Sylvester(n / m)) / sqrt(n),   m the largest order listed below that divides n, n / m a power of two

The matrices of order m are those of Sloane's table: Paley's and Williamson's constructions. Only the exact
matrix undoes what was done to the weights; another one of the same order gives noise.
"""

import math
from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from kernels.linear.transforms import BlockRotation, Hadamard, Permutation, Transform

PALEY_1 = (140, 108, 60, 20, 12)  # order q + 1, q a prime of 3 modulo 4
PALEY_2 = (36, 28)  # order 2 (q + 1), q a prime of 1 modulo 4
ORDERS = (172, 156, 140, 108, 60, 52, 36, 28, 20, 12)  # in the order in which they are tried
# By order: four symmetric circulant matrices, by the first (order / 4 + 1) / 2 entries of their first rows.
WILLIAMSON = MappingProxyType(
    {
        52: ("+-+--++", "+---+++", "++-+--+", "+----+-"),
        156: ("+++--+-+-----+--++--", "++++---+--++----+-+-", "+++--++-+---+-+--+--", "+---++-+-+-----+++-+"),
        172: (
            "+---++--++++-+-+++-++-",
            "++-++++++----+-+--++-+",
            "+++-+-++--+-+-++++-+--",
            "++---++++-+--+--++----",
        ),
    }
)


def hadamard_of(width: int, transposed: bool = False) -> tuple[Transform, ...]:
    """The transforms that multiply `width` channels by H_width, or its transpose.

    Raises ValueError where there is none, or none that is known.
    """
    order = next((order for order in ORDERS if width % order == 0), 1)
    run = width // order
    if run < 1 or run & (run - 1):
        raise ValueError(f"{width} channels are not a power of two times 1 or one of {', '.join(map(str, ORDERS))}")
    if order == 1:
        return (Hadamard(width),)
    matrix = matrix_of(order) / math.sqrt(order)  # [order, order]
    channels = torch.arange(width)
    spread = channels.view(order, run).t().flatten()  # the channels that the matrix mixes, side by side
    back = channels.view(run, order).t().flatten()
    rotation = BlockRotation((matrix.t() if transposed else matrix).contiguous().unsqueeze(0))
    return (Hadamard(run), Permutation(spread), rotation, Permutation(back))


def matrix_of(order: int) -> Tensor:
    """[order, order] float32 of +1 and -1. Raises ValueError for an order that is not known."""
    if order in PALEY_1:
        return _paley_1(order - 1)
    if order in PALEY_2:
        return _paley_2(order // 2 - 1)
    if order in WILLIAMSON:
        return _williamson(WILLIAMSON[order])
    raise ValueError(f"no Hadamard matrix of order {order} is known here")


def _residues(q: int) -> Tensor:
    """chi(j - i) for i, j below the prime q, [q, q]: 0, 1 for squares, else -1."""
    character = -torch.ones(q)
    character[torch.arange(q) ** 2 % q] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[None, :] - index[:, None]) % q]


def _paley_1(q: int) -> Tensor:
    matrix = torch.ones(q + 1, q + 1)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = torch.eye(q) - _residues(q)
    return matrix


def _paley_2(q: int) -> Tensor:
    conference = torch.ones(q + 1, q + 1)
    conference[0, 0] = 0
    conference[1:, 1:] = _residues(q)
    plus, minus = conference + torch.eye(q + 1), conference - torch.eye(q + 1)
    return torch.cat((torch.cat((plus, minus), dim=1), torch.cat((minus, -plus), dim=1)))


def _williamson(rows: Sequence[str]) -> Tensor:
    a, b, c, d = (_circulant(torch.tensor([1.0 if sign == "+" else -1.0 for sign in row])) for row in rows)
    blocks = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in blocks])


def _circulant(half: Tensor) -> Tensor:
    """[h] -> symmetric [2 h - 1, 2 h - 1]."""
    first = torch.cat((half, half[1:].flip(0)))
    index = torch.arange(first.shape[0])
    return first[(index[None, :] - index[:, None]) % first.shape[0]]
