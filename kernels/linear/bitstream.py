"""The packed codes of every family with codes: each row is a little-endian bit stream.

Code k occupies bits [k*b, (k+1)*b) of the row, bit 0 being the lowest bit of byte 0. For 4 bits that is low nibble
first; it is the byte image of a GPTQ column or a compressed-tensors row.
"""

import torch
from torch import Tensor

MAX_BITS = 8


def unpack_codes(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Little-endian bit stream [N, ceil(num_codes * bits / 8)] uint8 -> codes [N, num_codes] uint8."""
    if bits == MAX_BITS:
        return packed
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        planes = [(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(per_byte)]
        return torch.stack(planes, dim=-1).flatten(1)[:, :num_codes]
    first_bit = torch.arange(num_codes, device=packed.device) * bits
    padded = torch.nn.functional.pad(packed, (0, 1))  # a code may end in the byte after the last
    low = padded[:, first_bit // 8].int()
    high = padded[:, first_bit // 8 + 1].int()
    return (((low | (high << 8)) >> (first_bit % 8).int()) & ((1 << bits) - 1)).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] uint8, each below 2**bits -> little-endian bit stream [N, ceil(K * bits / 8)] uint8.

    Eight codes make `bits` bytes: they are joined in one 64-bit word, of which the low bytes are kept.
    """
    num_rows, num_codes = codes.shape
    octets = torch.nn.functional.pad(codes, (0, -num_codes % 8)).view(num_rows, -1, 8)
    words = octets[..., 0].long()  # [N, K / 8]
    for i in range(1, 8):
        words |= octets[..., i].long() << (bits * i)
    stream = words.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(1)  # [N, K / 8 * bits]
    return stream[:, : -(-num_codes * bits // 8)].contiguous()
