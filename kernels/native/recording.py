"""Layers as one native call: what Python says between kernels is the same in every step of as many rows.

A recording runs layers as they are, keeps the native calls they make (kernels/native/tape.hpp), and gives them memory
that stays. Anything that torch would compute in between is lost to it, and is refused.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
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
# The input's memory under another shape. The last four copy where they must, and are looked at.
_VIEW: frozenset[Any] = frozenset(
    {_aten.view, _aten._unsafe_view, _aten.alias, _aten.detach, _aten.slice, _aten.select, _aten.unsqueeze,
     _aten.squeeze, _aten.expand, _aten.reshape, _aten.flatten, _aten.contiguous, _aten.to}
)  # fmt: skip
_COMBINE = MappingProxyType({_aten.add: "add", _aten.sub: "subtract", _aten.mul: "multiply", _aten.mul_: "multiply"})


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
    that compute, but for a few on float32 that native calls make instead, to the same bits."""

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
        if name in _COMBINE and not kwargs and isinstance(args[1], Tensor):
            x = _floats(name, args[0])
            return _combine(_COMBINE[name], x, _floats(name, args[1]), x if name is _aten.mul_ else self._like(x))
        if (
            name is _aten.clamp
            and not kwargs
            and len(args) == 3
            and all(isinstance(bound, float) for bound in args[1:])
        ):
            out = self._like(x := _floats(name, args[0]))
            _native.clamp(x.data_ptr(), args[1], args[2], x.numel(), out.data_ptr())
            return out
        if name is _aten.gather and not kwargs:
            return self._gather(_floats(name, args[0]), args[1], args[2])
        raise Unrecordable(f"torch computes '{name.__name__}'")

    def _allocate(self, name: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        shape = args[0] if name is _aten.empty else args[0].shape if name is _aten.empty_like else args[1]
        dtype = kwargs.get("dtype") or (torch.float32 if name is _aten.empty else args[0].dtype)
        self._place += 1
        return self._buffers.take(self._turn, self._place, tuple(shape), dtype)

    def _like(self, x: Tensor) -> Tensor:
        self._place += 1
        return self._buffers.take(self._turn, self._place, x.shape, x.dtype)

    def _gather(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        """Channels of each head in an order that all tokens share.  x, index: [num_tokens, num_heads, D]"""
        fits = x.dim() == 3 and dim in (-1, 2) and index.shape == x.shape and index.dtype == torch.int64
        if not fits or index.stride()[1:] != (x.shape[2], 1) or (len(x) > 1 and index.stride(0) != 0):
            raise Unrecordable("torch gathers in orders that tokens do not share")
        out = self._like(x)
        num_tokens, num_heads, head_dim = x.shape
        _native.gather_heads(x.data_ptr(), index.data_ptr(), num_tokens, num_heads, head_dim, out.data_ptr())
        return out


# torch wraps the method of every mode in one that imports its compiler when it is first called: 1 to 4 s and 95 MB, for
# what nobody compiles here.
setattr(Recording, "__torch_dispatch__", inspect.unwrap(Recording.__torch_dispatch__))  # noqa: B010


def _floats(name: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise Unrecordable(f"torch computes {name.__name__} of {x.dtype} {list(x.shape)}")
    return x


def _combine(op: str, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """out = x op y; y has x's shape, or that of its last dimensions."""
    if x.shape[x.dim() - y.dim() :] != y.shape or y.dim() == 0:
        raise Unrecordable(f"torch combines {list(x.shape)} and {list(y.shape)}")
    repeated, width = y.dim() < x.dim(), y.numel() if y.dim() < x.dim() else x.shape[-1]
    rows = (x.numel() // width, width)
    _native.combine_rows(getattr(_native.Combine, op), x.data_ptr(), y.data_ptr(), *rows, repeated, out.data_ptr())
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
