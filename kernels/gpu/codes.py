"""Where the bits of codes lie in a word, so that few instructions make bfloat16 of them (kernels/gpu/linear.py).

A word holds two channels of each of P planes. What is said of a way to lie is [P, 2, codes] int32: what a code of a
plane's first or second channel adds to the word, by XOR.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

HALF_WORD = 16  # bits
WORD = 2 * HALF_WORD
LOW_BITS = (1 << WORD) - 1
NIBBLES = 16  # codes of 4 bits


def in_halves(bits: int, stored: Sequence[int]) -> Tensor:
    """Codes of `bits` bits side by side in each half. stored: what is stored for each code."""
    shifts = [[HALF_WORD * half + j * bits for half in range(2)] for j in range(HALF_WORD // bits)]
    return _table([[[code << shift for code in stored] for shift in pair] for pair in shifts])


def in_bytes(stored: Sequence[int]) -> Tensor:
    """The two codes of plane j in byte j. stored: the nibble for each code."""
    return _table([[[code << (8 * j + 4 * half) for code in stored] for half in range(2)] for j in range(4)])


def as_e2m1() -> Tensor:
    """As `e2m1_planes` finds them."""
    return _table([[[_e2m1_word(j, half, code) for code in range(NIBBLES)] for half in range(2)] for j in range(4)])


def _table(words: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    return torch.stack([torch.stack([words_of(half) for half in pair]) for pair in words])


def words_of(words: Sequence[int]) -> Tensor:
    """[words] int32 of the same bits."""
    return torch.tensor([word - (word >> (WORD - 1) << WORD) for word in words], dtype=torch.int32)


# -- E2M1 --------------------------------------------------------------------------------------------------------------

PLACES = (6, 7, 8, 15)  # of fraction, exponent and sign in a half-word: a bfloat16, 2^-126 of what the code means


def e2m1_planes(word: int) -> list[int]:
    """The bits that the kernel finds: 32 for each of 4 planes, of which those in PLACES of each half count."""
    turned = (word << 12 | word >> 20) & LOW_BITS
    signed = (word >> 6) | (0xFC000000 if word >> 31 else 0)
    return [word, word << 6 & LOW_BITS, turned, signed ^ (word << 2 & LOW_BITS)]


def _e2m1_word(plane: int, half: int, code: int) -> int:
    """The one word in which the kernel finds `code` there and 0 everywhere else."""
    word = 0
    for bit in range(4):
        if code >> bit & 1:
            word ^= _e2m1_bits()[16 * half + 4 * plane + bit]
    return word


@cache
def _e2m1_bits() -> tuple[int, ...]:
    """For each bit that the kernel finds, 16 half + 4 plane + i, the word that gives it alone.

    What is found is a linear function of the word over the field of two elements; this is its inverse. Four signs and
    four times three bits side by side cannot be cut out of 16 bits by four shifts and masks, but by five shifts, two of
    them added, they can.
    """
    rows = []  # (what is found in the word of one bit, that word)
    for bit in range(WORD):
        planes = e2m1_planes(1 << bit)
        found = [planes[j] >> (HALF_WORD * half + at) & 1 for half in range(2) for j in range(4) for at in PLACES]
        rows.append((sum(one << i for i, one in enumerate(found)), 1 << bit))
    for i in range(WORD):
        pivot = next(k for k in range(i, WORD) if rows[k][0] >> i & 1)
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(WORD):
            if k != i and rows[k][0] >> i & 1:
                rows[k] = (rows[k][0] ^ rows[i][0], rows[k][1] ^ rows[i][1])
    return tuple(word for _, word in rows)


# -- tables ------------------------------------------------------------------------------------------------------------

SIGN, TOP = 0x80, 0xFF


@dataclass(frozen=True)
class ByteTable:
    """A table of 16 bfloat16 as `prmt` looks bytes up (kernels/gpu/linear.py, looked_up).

    An instruction has 8 entries. For a code of 8 or more it gives the sign of one, eight times. So the byte of a code
    comes from two at once, each of which undoes what the other adds:

        byte(c) = first[c] ^ sign(second[c])            c < 8
        byte(c) = second[c - 8] ^ sign(first[c - 8])    c >= 8

    These two always agree in their top bit. So codes are given other nibbles: those whose entries agree in the top bits
    of both bytes differ by 8. Where entries cannot be paired so, one of two bytes is chosen, for half an instruction a
    weight more: `mixed`.
    """

    order: tuple[int, ...]  # [16] nibble that stands for each code
    words: tuple[int, ...]  # [8] `first` and `second` of the lower byte, then of the upper one, two words each
    mixed: bool


@cache
def byte_table(values: tuple[float, ...]) -> ByteTable:
    """values: up to 16, rounded to bfloat16. Codes beyond them mean 0."""
    bits = torch.tensor(values, dtype=torch.bfloat16).view(torch.int16).tolist()
    entries = [int(entry) & 0xFFFF for entry in bits] + [0] * (NIBBLES - len(values))
    zeros = [code for code, entry in enumerate(entries) if entry in (0, SIGN << 8)]
    pairs = None
    for num_negative in range(len(zeros) + 1):  # a zero has the sign that suits
        for i, code in enumerate(zeros):
            entries[code] = (SIGN << 8) * (i < num_negative)
        pairs = pairs or _pairs(entries)
        if pairs is not None:
            break
    order = [0] * NIBBLES
    for i, (one, other) in enumerate(pairs or ((i, i + 8) for i in range(8))):
        order[one], order[other] = i, i + 8
    code_of = sorted(range(NIBBLES), key=order.__getitem__)
    words: list[int] = []
    for shift in (0, 8):
        found = [entries[code] >> shift & 0xFF for code in code_of]
        if pairs is not None:  # `second` has the top bit 0, and so no sign
            found[8:] = [high ^ TOP * (low >> 7) for low, high in zip(found[:8], found[8:], strict=True)]
        words += _words(found)
    return ByteTable(tuple(order), tuple(words), pairs is None)


def _pairs(entries: Sequence[int]) -> list[tuple[int, int]] | None:
    """Codes two by two, of equal top bits of both bytes; None where there are not."""
    classes: dict[int, list[int]] = {}
    for code, entry in enumerate(entries):
        classes.setdefault(entry & (SIGN << 8 | SIGN), []).append(code)
    if any(len(codes) % 2 for codes in classes.values()):
        return None
    return [(codes[i], codes[i + 1]) for codes in classes.values() for i in range(0, len(codes), 2)]


def _words(table: Sequence[int]) -> list[int]:
    """Bytes, lowest first, four to a word."""
    return [int.from_bytes(bytes(table[i : i + 4]), "little") for i in range(0, len(table), 4)]
