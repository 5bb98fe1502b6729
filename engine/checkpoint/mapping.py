"""Give back the memory of a file that is mapped and has been read."""

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")


class MappedFiles:
    """Files that stay mapped as long as this is used: where one lies is looked up once, since the list of mappings is
    long, and a model has hundreds of tensors."""

    def __init__(self) -> None:
        self._spans: dict[Path, range] = {}  # addresses

    def drop_pages(self, tensor: Tensor, file: Path) -> None:
        """Let go of the resident pages wholly under `tensor`; they are read from `file` again when touched.

        Does nothing where that is not sure to be harmless: when the tensor does not lie in a mapping of the file.
        """
        if not tensor.is_contiguous():
            return
        page = mmap.PAGESIZE
        start = -(-tensor.data_ptr() // page) * page
        stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
        if start < stop and self._is_mapped(start, stop, file):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)

    def _is_mapped(self, start: int, stop: int, file: Path) -> bool:
        span = self._spans.get(file)
        if span is None or start not in span or stop > span.stop:
            span = _mapping_around(start, stop, file.resolve())
            if span is not None:
                self._spans[file] = span
        return span is not None


def _mapping_around(start: int, stop: int, file: Path) -> range | None:
    """The addresses of the one read-only or private mapping of `file` that covers these."""
    if not MAPS.is_file():
        return None
    for line in MAPS.read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        low, high = (int(address, 16) for address in span.split("-"))
        if low <= start and stop <= high:
            return range(low, high) if name and name[0] == str(file) else None
    return None
