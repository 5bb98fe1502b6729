"""Small tensors on their way between host and device, so that neither waits for the other.

From pageable memory a copy waits until the device has done all it was given; from pinned memory it is one more thing
that the device was given. Pinned memory comes from torch, which keeps what is freed and hands it out again only when
the copies from it and into it are done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class Parcel:
    """Tensors that lie in one buffer, so that one copy moves them all."""

    buffer: Tensor  # [num_bytes] uint8
    tensors: list[Tensor]  # views of it


def pack(tensors: Sequence[Tensor], device: torch.device) -> Parcel:
    """Tensors on the host as a parcel there, ready to be sent to `device`."""
    buffer = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    parcel = _opened(buffer, tensors)
    for target, source in zip(parcel.tensors, tensors, strict=True):
        target.copy_(source)
    return parcel


def send(tensors: Sequence[Tensor], device: torch.device) -> Parcel:
    """Copies of tensors on the host, on `device`. Nobody waits."""
    parcel = pack(tensors, device)
    return _opened(parcel.buffer.to(device, non_blocking=True), tensors)


def refill(held: Parcel, tensors: Sequence[Tensor]) -> None:
    """Put tensors on the host where others of the same shapes and types lie. Raises ValueError for other shapes."""
    for target, source in zip(held.tensors, tensors, strict=True):
        if target.shape != source.shape or target.dtype != source.dtype:
            found, room = (f"{list(one.shape)} of {one.dtype}" for one in (source, target))
            raise ValueError(f"{found} cannot take the place of {room}")
    held.buffer.copy_(pack(tensors, held.buffer.device).buffer, non_blocking=True)


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """The byte at which each begins, and where the last one ends."""
    return list(accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))


def _opened(buffer: Tensor, like: Sequence[Tensor]) -> Parcel:
    parts = zip(_starts(like), like, strict=False)
    return Parcel(buffer, [buffer[at : at + one.nbytes].view(one.dtype).view(one.shape) for at, one in parts])


class Fetch:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._arrival: Any = None  # an event, of torch.cuda without types
        self._tensors = list(tensors)
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self._tensors = [_pinned(tensor) for tensor in tensors]
            make_event: Any = torch.cuda.Event
            self._arrival = make_event()
            self._arrival.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, when all that the device was given before they were asked for is done."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensors


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
