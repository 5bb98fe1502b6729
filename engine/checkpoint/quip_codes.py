"""The codebooks of QuIP# and how its codes are packed.

E8P, 2^16 vectors of 8: code c names row c >> 8 of 256 rows of positive halves and, in its low byte, the signs. A row
whose sum is odd has its last entry negated. With p the parity of the low byte s,

    v[i] = row[i] * (-1)^(bit BIT[i] of s ^ p) + (1/4 if p is 0 else -1/4)

so that every vector lies in E8 + 1/4: the 227 rows are those of norm at most 10, 29 more have norm 12.

E8 of one bit, 2^8 vectors of 8: the origin, the 240 shortest vectors of E8, whole ones first, and 15 of twice a unit.
"""

import torch
from torch import Tensor

VECTOR = 8
BIT = (0, 4, 1, 5, 2, 6, 3, 7)  # of the signs, for each entry
# Which three entries of the 29 rows of norm 12 are 1/2; the others are 3/2.
NORM_12 = tuple(
    tuple(int(index) for index in row)
    for row in [
        "123",
        "023",
        "013",
        "012",
        "367",
        "357",
        "356",
        "347",
        "346",
        "345",
        "267",
        "257",
        "256",
        "247",
        "246",
        "245",
        "167",
        "157",
        "156",
        "147",
        "146",
        "045",
        "067",
        "057",
        "056",
        "047",
        "046",
        "014",
        "237",
    ]
)
ROWS_PER_TILE, VECTORS_PER_TILE = 16, 8


def e8p_book() -> Tensor:
    """[65536, 8] float16, exact."""
    ladder = torch.tensor([1.0, 3.0, 5.0, 7.0])
    grid = torch.cartesian_prod(*[ladder] * VECTOR)  # in halves, rising
    padding = torch.full((len(NORM_12), VECTOR), 3.0)
    padding.scatter_(1, torch.tensor(NORM_12), 1.0)
    rows = torch.cat((grid[grid.square().sum(1) <= 40], padding)) / 2  # [256, 8]
    rows[:, -1] *= 1 - 2 * (rows.sum(1) % 2)
    low = torch.arange(256)
    parity = torch.stack([low >> bit & 1 for bit in range(8)]).sum(0) % 2  # [256]
    signs = torch.stack([((low ^ parity) >> bit & 1) for bit in BIT], dim=1)  # [256, 8]
    vectors = rows[:, None] * (1 - 2 * signs) + (0.25 - 0.5 * parity)[:, None]  # [256, 256, 8]
    return vectors.view(-1, VECTOR).half()


def e8_book() -> Tensor:
    """[256, 8] float16, exact."""
    whole = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * VECTOR)
    half = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * VECTOR)
    short = torch.cat((whole[whole.square().sum(1) <= 2], half))
    double = 2 * torch.eye(VECTOR)
    return torch.cat((short[short.sum(1) % 2 == 0], double, -double[:-1])).half()


def unpack_e8p(words: Tensor) -> Tensor:
    """Packed codes [N, K / 32] int64 -> [N, K / 8] int16, whose bits are the code.

    A tile is 16 rows by 8 vectors, in 8 x 4 words; a word holds 2 rows by 2 vectors, the rows changing first: in its
    low half the four high bytes, in its high half the low bytes, bit j of the four side by side.
    """
    num_rows, num_words = words.shape
    tiles = words.contiguous().view(num_rows // ROWS_PER_TILE, num_words * 4 // VECTORS_PER_TILE, 8, 4)
    data = tiles.unsqueeze(-1).view(torch.uint8)  # [row tiles, column tiles, 8, 4, 8]
    codes = []
    for i in range(4):
        code = data[..., i].int() << 8
        for j in range(8):
            code |= (data[..., 4 + j // 2].int() >> (4 * (j % 2) + i) & 1) << j
        codes.append(code.to(torch.int16))
    # [row tiles, column tiles, 8, 4, vectors, rows] -> [row tiles, 8, rows, column tiles, 4, vectors]
    packed = torch.stack(codes, dim=-1).view(*tiles.shape, 2, 2)
    return packed.permute(0, 2, 5, 1, 3, 4).reshape(num_rows, num_words * 4)


def unpack_bytes(words: Tensor) -> Tensor:
    """Packed codes [N, K / 64] int64 -> [N, K / 8] uint8, the first in the low byte."""
    return words.contiguous().view(torch.uint8)
