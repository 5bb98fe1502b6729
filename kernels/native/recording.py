"""Layers as one native call: what Python says between kernels is the same in every step of as many rows.

A recording runs layers as they are, keeps the native calls they make (kernels/native/tape.hpp), and gives them memory
that stays. Anything that torch would compute in between is lost to it, and is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import native
from kernels.contract import AttentionInputs

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

_aten: Any = torch.ops.aten
_ALLOCATE: frozenset[Any] = frozenset({_aten.new_empty, _aten.empty_like, _aten.empty})
# The input's memory under another shape. The last two copy what is not contiguous, and are looked at.
_VIEW: frozenset[Any] = frozenset(
    {_aten.view, _aten._unsafe_view, _aten.alias, _aten.detach, _aten.slice, _aten.select, _aten.unsqueeze,
     _aten.squeeze, _aten.reshape, _aten.flatten, _aten.contiguous}
)  # fmt: skip


class Unrecordable(RuntimeError):
    """The layers do what a recording cannot repeat."""


class Step(Protocol):
    """What an attention kernel prepared for the rows of one step. Recorded calls refer to it."""

    def become(self, other: Any, /) -> None:
        """Take over what was prepared for other rows."""
        ...


@runtime_checkable
class StepKernel(Protocol):
    """An attention kernel whose calls can be recorded."""

    def step(self, cache: Any, inputs: AttentionInputs) -> Step:
        """What `cache`'s calls for these rows share; made by the first."""
        ...

    def new_step(self, cache: Any, inputs: AttentionInputs) -> Step:
        """The same, made now and shared with nobody."""
        ...


class Buffers:
    """Memory for what recorded layers write, by turns: what one layer wrote is read by the next, and by no later one.

    Recordings of different numbers of rows share it, for one runs at a time.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._held: dict[tuple[int, int, int], Tensor] = {}  # turn, place in the layer, bytes

    @property
    def num_bytes(self) -> int:
        return sum(held.numel() for held in self._held.values())

    def take(self, turn: int, place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose first dimension is rows, or a multiple of them."""
        tensor = torch.empty(0, dtype=dtype)
        per_row = -(-_numel(shape[1:]) * tensor.element_size() // 64) * 64  # whole lines
        num_bytes = per_row * max(self._max_rows, shape[0] if shape else 1)
        key = (turn, place, num_bytes)
        if key not in self._held:
            self._held[key] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._held[key][: _numel(shape) * tensor.element_size()].view(dtype).view(tuple(shape))


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch._python_dispatch is partly typed
    """While it is entered, native calls of this thread are made and kept. Raises Unrecordable from torch's functions
    that compute; sums of float32 are made by a native call instead, which rounds as torch does."""

    def __init__(self, buffers: Buffers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers = buffers
        self._tape = _native.Tape()
        self._turn = self._place = 0

    def __enter__(self) -> Self:
        self._tape.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._tape.stop()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def next_layer(self) -> None:
        """From here on, memory is written that the layer before the last one wrote."""
        self._turn, self._place = 1 - self._turn, 0

    def run(self) -> None:
        """Make the calls again."""
        self._tape.run()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        if name in _ALLOCATE:
            return self._allocate(name, args, kwargs)
        if name in _VIEW:
            return _view(func, args, kwargs)
        if name is _aten.add and not kwargs and isinstance(args[1], Tensor):
            return self._add(args[0], args[1])
        raise Unrecordable(f"torch computes {name.__name__}")

    def _allocate(self, name: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        shape = args[0] if name is _aten.empty else args[0].shape if name is _aten.empty_like else args[1]
        dtype = kwargs.get("dtype") or (torch.float32 if name is _aten.empty else args[0].dtype)
        self._place += 1
        return self._buffers.take(self._turn, self._place, tuple(shape), dtype)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, y of x's shape or one row."""
        repeated = y.dim() == 1 and x.dim() == 2
        fits = y.shape == (x.shape[1:] if repeated else x.shape)
        if not fits or not all(one.dtype == torch.float32 and one.is_contiguous() for one in (x, y)):
            raise Unrecordable(f"torch adds {list(y.shape)} of {y.dtype} to {list(x.shape)} of {x.dtype}")
        self._place += 1
        out = self._buffers.take(self._turn, self._place, x.shape, x.dtype)
        width = x.shape[-1]
        _native.add_rows(x.data_ptr(), y.data_ptr(), x.numel() // width, width, repeated, out.data_ptr())
        return out


def _view(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    result = func(*args, **kwargs)
    if result.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
        raise Unrecordable(f"torch copies rows of {list(args[0].shape)}")
    return result


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
