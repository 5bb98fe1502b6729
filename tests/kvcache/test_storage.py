"""The memory under the pages."""

import mmap

import pytest
import torch

from kvcache.storage import HUGE_PAGE, zeros

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 2, 5, 16, 8), (70, 2, 8, 64, 64)], ids=["small", "in huge pages"])
def test_memory_is_zero_and_its_own(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Bug: two layers on the same memory, a page that starts as garbage, or memory that is gone with its mapping."""
    first, second = zeros(shape, dtype, CPU), zeros(shape, dtype, CPU)
    assert first.shape == shape
    assert first.is_contiguous()
    assert not first.any()
    first[-1] = 1
    assert not second.any()
    if first.numel() * first.element_size() >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert first.data_ptr() % HUGE_PAGE == 0
    del second
    assert bool((first[-1] == 1).all())
    assert not first[:-1].any()


def test_more_than_there_is_says_how_much() -> None:
    """Bug: a process that the system kills later in place of an error now."""
    with pytest.raises((MemoryError, RuntimeError)):
        zeros((1 << 50,), torch.float16, CPU)
