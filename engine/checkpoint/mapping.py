"""Give back the memory of a file that is mapped and has been read."""

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")


def drop_file_pages(tensor: Tensor, file: Path) -> None:
    """Let go of the resident pages wholly under `tensor`; they are read from `file` again when touched.

    Does nothing where that is not sure to be harmless: when the tensor does not lie in a mapping of the file.
    """
    if not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if start < stop and _is_mapped(start, stop, file.resolve()):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _is_mapped(start: int, stop: int, file: Path) -> bool:
    """Whether one read-only or private mapping of `file` covers the addresses."""
    if not MAPS.is_file():
        return False
    for line in MAPS.read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        low, high = (int(address, 16) for address in span.split("-"))
        if low <= start and stop <= high:
            return bool(name) and name[0] == str(file)
    return False
