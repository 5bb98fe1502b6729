"""RoPE and the store of keys and values in one launch, under Triton's interpreter: test_gpu_families.py runs this file
in a process of its own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention.f16.gpu import F16Triton
from kernels.attention.f16.layout import page_shape
from kernels.attention.quantized.gpu import QuantizedTriton
from kernels.attention.quantized.transforms import Hadamard
from kernels.contract import RotatingKernel
from kernels.rope.gpu import RopeTriton
from tests.kernels.test_attention import inputs_of as plain_inputs
from tests.kernels.test_kv_attention import cache_of, codec_of, inputs_of, tokens


def angles_of(num_tokens: int, half: int) -> tuple[Tensor, Tensor]:
    radians = torch.randn(num_tokens, half, generator=torch.Generator().manual_seed(3))
    return radians.cos(), radians.sin()


def apart(kernel: Any, rows: tuple[Tensor, ...], angles: tuple[Tensor, Tensor], cache: Any, inputs: Any) -> Tensor:
    """One launch after the other."""
    q, k = RopeTriton().rotate_pair(rows[0], rows[1], *angles)
    kernel.store(k, rows[2], cache, inputs)
    return q


@pytest.mark.parametrize(("bits", "window"), [((4.0, 4.0), 0), ((2.0, 1.5), 9), ((8.0, 16.0), 9)], ids=str)
def test_packed_pages_are_those_of_separate_launches(bits: tuple[float, float], window: int) -> None:
    """To the bit, infinite keys and rows that are not kept among them. Bugs: a head that reads its neighbour's angles,
    halves exchanged, values that are turned, keys that are not rounded before they are transformed."""
    codec = replace(codec_of(bits, window=window), key_transform=Hadamard(), value_transform=Hadamard())
    q, k, v = (x.bfloat16() for x in tokens(3, seed=1))
    k[1, 1, 3], v[2, 0, 5] = torch.inf, -torch.inf
    inputs, angles = inputs_of(codec, (15, 2, 0), (2, 1, 1)), angles_of(3, 16)
    kernel, caches = QuantizedTriton(), [cache_of(codec), cache_of(codec)]
    assert isinstance(kernel, RotatingKernel)
    found = kernel.rotate_and_store(q, k, v, angles, caches[0], inputs)
    assert torch.equal(found, apart(kernel, (q, k, v), angles, caches[1], inputs))
    assert torch.equal(caches[0].pages, caches[1].pages)
    assert torch.equal(caches[0].recent.nan_to_num(7), caches[1].recent.nan_to_num(7))


@pytest.mark.parametrize("head_dim", [10, 64])
def test_plain_pages_are_those_of_separate_launches(head_dim: int) -> None:
    q, k, v = (x.bfloat16() for x in tokens(5, seed=1, head_dim=head_dim))
    pages = [torch.zeros(page_shape(2, 16, head_dim), dtype=torch.float16).repeat(4, 1, 1, 1, 1) for _ in range(2)]
    inputs, angles, kernel = plain_inputs((13, 5, [2, 1])), angles_of(5, head_dim // 2), F16Triton()
    found = kernel.rotate_and_store(q, k, v, angles, pages[0], inputs)
    assert torch.equal(found, apart(kernel, (q, k, v), angles, pages[1], inputs))
    assert torch.equal(*pages)
    assert bool(pages[0].any())
