"""What the native back ends refuse before they hand over an address: memory of another dtype, device or layout."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from kernels import native
from kernels.attention.f16.layout import page_shape
from kernels.contract import Filters
from tests.kernels.weights import random_affine, random_dense

if native.MISSING is not None:
    pytest.skip(native.MISSING, allow_module_level=True)

from kernels.activation.native import ActivationNative
from kernels.attention.f16.native import F16Native
from kernels.linear.affine.native import AffineNative, AffineNativeFloat
from kernels.linear.affine.quantize import quantize_symmetric
from kernels.linear.dense.native import DenseNative
from kernels.norm.native import NormNative
from kernels.rope.native import RopeNative
from kernels.sampling.native import SamplingNative

NORM, ROPE, ATTENTION, SAMPLING = NormNative(), RopeNative(), F16Native(), SamplingNative()
INPUTS = build_batch([BatchRow([0, 0], 0, [0], 16, 0)]).attention  # two tokens, page 0
PAGES = torch.zeros(2, *page_shape(2, 16, 8))
FILTERS = Filters(1.0, 0, 1.0, 0.0)


def linear(kernel: DenseNative | AffineNative | AffineNativeFloat, x: Tensor) -> object:
    if isinstance(kernel, DenseNative):
        joined = kernel.join([kernel.prepare(random_dense(32, 9, torch.float32, 1))])
    else:
        joined = kernel.join([kernel.prepare(random_affine(4, 32, 9, 16, torch.float16, 1))])
    assert joined is not None
    return kernel.linear(x, joined)


CALLS: dict[str, tuple[Callable[..., object], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, w: NORM.rms_norm(x, w, 1e-5), ((2, 32), (32,))),
    "add_rms_norm": (lambda x, d, w: NORM.add_rms_norm(x, d, w, 1e-5), ((2, 32), (2, 32), (32,))),
    "swiglu": (ActivationNative().swiglu, ((2, 32), (2, 32))),
    "rotate_pair": (ROPE.rotate_pair, ((2, 4, 8), (2, 2, 8), (2, 4), (2, 4))),
    "store": (lambda k, v: ATTENTION.store(k, v, PAGES.clone(), INPUTS), ((2, 2, 8), (2, 2, 8))),
    "attend": (lambda q: ATTENTION.attend(q, PAGES, INPUTS, 1.0), ((2, 4, 8),)),
    "dense": (lambda x: linear(DenseNative(), x), ((2, 32),)),
    "affine": (lambda x: linear(AffineNative(), x), ((2, 32),)),
    "affine float": (lambda x: linear(AffineNativeFloat(), x), ((2, 32),)),
    "argmax": (SAMPLING.argmax, ((32,),)),
    "draw": (lambda x: SAMPLING.draw(x, FILTERS, 0.5), ((32,),)),
    "log_probs": (lambda x: SAMPLING.log_probs(x, 0, 1), ((32,),)),
}


@pytest.mark.parametrize(
    ("name", "place"), [(name, i) for name, (_, shapes) in CALLS.items() for i in range(len(shapes))]
)
def test_every_tensor_must_be_float32_on_the_cpu(name: str, place: int) -> None:
    """Bug: float32 written into a result of 16 bits, past its end; 16 bits or 64 read as 32."""
    call, shapes = CALLS[name]
    tensors = [torch.ones(shape) for shape in shapes]
    call(*tensors)
    for other in (tensors[place].bfloat16(), tensors[place].double(), tensors[place].to("meta")):
        with pytest.raises(ValueError, match=r"must be (a row of )?float32 on the CPU, found"):
            call(*tensors[:place], other, *tensors[place + 1 :])


@pytest.mark.parametrize("field", ["block_tables", "slots"])
def test_ids_of_32_bits(field: str) -> None:
    """Bug: two ids read as one, a page far outside the cache."""
    inputs = replace(INPUTS, **{field: getattr(INPUTS, field).int()})
    with pytest.raises(ValueError, match=f"{field} must be int64 on the CPU, found int32"):
        ATTENTION.attend(torch.ones(2, 4, 8), PAGES, inputs, 1.0)


def test_pages_of_every_layer_are_checked() -> None:
    """Bug: only the first layer of a step is looked at, and the next one's pages are a view of others."""
    inputs, q = replace(INPUTS), torch.ones(2, 4, 8)
    ATTENTION.attend(q, PAGES, inputs, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        ATTENTION.attend(q, torch.zeros(4, *PAGES.shape[1:])[::2], inputs, 1.0)
    with pytest.raises(ValueError, match="pages must be float16 or float32 on the CPU, found bfloat16"):
        ATTENTION.attend(q, PAGES.bfloat16(), inputs, 1.0)


def test_a_weight_that_is_a_view_of_others() -> None:
    """Bug: every second weight asked for, the first half read."""
    x, weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), torch.arange(64.0)[::2]
    assert torch.equal(NORM.rms_norm(x, weight, 1e-5), NORM.rms_norm(x, weight.clone(), 1e-5))
    for a, b in zip(NORM.add_rms_norm(x, x, weight, 1e-5), NORM.add_rms_norm(x, x, weight.clone(), 1e-5), strict=True):
        assert torch.equal(a, b)


def test_angles_of_three_dimensions() -> None:
    """Bug: [num_tokens, 2, D / 2] passes by its first and last size, and angles of other tokens are read."""
    heads, angles = torch.ones(3, 2, 8), torch.ones(3, 2, 4)
    with pytest.raises(ValueError, match="need angles of"):
        ROPE.rotate_pair(heads, heads, angles, angles)


def test_weights_of_a_dtype_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="weights must be float16 or bfloat16 or float32 on the CPU, found float64"):
        quantize_symmetric(torch.ones(4, 32, dtype=torch.float64), 16)
