"""A GPU that is not there: tensors that say they lie on cuda:0 and are computed on the CPU.

Whatever a real GPU would refuse is refused, and what costs more than it looks like is counted: tensors of two devices
in one operation, kernels given what they cannot read, what cannot be recorded in a graph, and every wait for the
device. Triton's kernels are not run: what they would write stays zero, so that the id which is drawn is always 0.
"""

import gc
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.gpu
import tests.kernels
from engine.graphs import CudaRecorder
from tests.kernels import gpu_compile

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FREE_BYTES = 80 << 30
MAX_GRID = (2**31 - 1, 65535, 65535)
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}
ALIGNMENT = 16  # bytes of an address, and of an int: Triton compiles anew where it changes
FLOATS = {"*bf16", "*fp16", "*fp32"}
PARAMETERS = {"scales", "zeros", "offsets", "scale_steps", "offset_steps"}  # as a checkpoint has them
OUT = {"out": {"*bf16", "*fp32"}}
MORE = {  # types that no budget is kept of
    "linear.few": OUT,
    "linear.many": OUT,
    "attention.store": {"k": {"*fp32"}, "v": {"*fp32"}},
    "attention.merge": {"out": {"*fp32"}},
    "attention.combine": {"out": {"*fp32"}},
    "quantize.hadamard": {"x": {"*fp32"}, "out": {"*bf16"}},
}
TYPES = gpu_compile.TYPES | {torch.float64: "fp64", torch.int64: "i64"}
SYNCS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "allclose"}
SYNCS |= {"unique_consecutive", "bincount", "repeat_interleave.Tensor", "repeat_interleave.self_Tensor"}
NO_NUMBERS = {"index_select", "gather", "embedding"}  # which take no single number from the CPU
TO_HOST = {Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__, Tensor.item, Tensor.tolist}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class OnGpu(Tensor):
    """A tensor on cuda:0, whose numbers are those of `held`, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        with torch.inference_mode(mode=False):  # or views of weights could not be taken in one
            made: OnGpu = Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=CPU,  # as far as C++ sees, which would ask a driver otherwise
            )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} of a tensor on the GPU, outside of it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({list(self.shape)}, {self.dtype})"


@dataclass(frozen=True)
class Launched:
    """One launch of a kernel."""

    kernel: str  # "linear.few"
    grid: tuple[int, ...]
    compiled: tuple[Any, ...]  # what Triton compiles anew for: constants, types, sizes that are 1 or multiples of 16


@dataclass
class Gpu:
    """What has happened since `clear`."""

    syncs: list[str] = field(default_factory=list)  # operations that wait until the device has nothing left to do
    uploads: list[str] = field(default_factory=list)  # copies to the device that do not wait
    downloads: list[str] = field(default_factory=list)  # and from it
    pinned: list[Tensor] = field(default_factory=list)  # memory of the host without which a copy waits
    launches: list[Launched] = field(default_factory=list)
    is_recording: bool = False
    is_weighed: bool = False  # whether memory that is taken is no longer free: counting takes a fifth of a second

    def clear(self) -> None:
        self.syncs.clear()
        self.uploads.clear()
        self.downloads.clear()
        self.pinned.clear()
        self.launches.clear()

    def wait(self, what: str) -> None:
        if self.is_recording:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        self.syncs.append(what)

    def upload(self, what: str, source: Tensor | None = None) -> None:
        """source: what is copied without waiting, if nothing keeps it from that."""
        if source is None or not self.is_pinned(source) or self.is_recording:
            self.wait(f"upload by {what}")
        else:
            self.uploads.append(what)

    def is_pinned(self, tensor: Tensor) -> bool:
        at = tensor.untyped_storage().data_ptr()
        return any(held.untyped_storage().data_ptr() == at for held in self.pinned)


class Asked(TorchFunctionMode):
    """What torch decides before an operation is dispatched: where a tensor goes, and which device "cuda" is."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) != 1 or kwargs:  # one argument names no device, as of most attributes
            args, kwargs = (mapped(with_index, part) for part in (args, kwargs or {}))
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == CUDA:
            self._gpu.upload("torch.tensor")
            return OnGpu(func(*args, **(kwargs | {"device": CPU})))
        is_on_gpu = bool(args) and isinstance(args[0], OnGpu)
        if is_on_gpu and func in TO_HOST:
            self._gpu.wait(func.__name__)
            return func(*held_of(args))
        if func in (Tensor.to, Tensor.cpu) and (is_on_gpu or CUDA in (*args, *kwargs.values())):
            return self._to(args, kwargs, to_host=func is Tensor.cpu)
        return func(*args, **kwargs)

    def _to(self, args: Any, kwargs: Any, to_host: bool) -> Tensor:
        """Tensor.to, from or to the device."""
        wanted = [part.device if isinstance(part, Tensor) else part for part in (*args[1:], *kwargs.values())]
        devices = [part for part in wanted if isinstance(part, torch.device)] + [CPU] * to_host
        dtypes = [part for part in wanted if isinstance(part, torch.dtype)]
        dtypes += [part.dtype for part in args[1:] if isinstance(part, Tensor)]
        source: Tensor = held_of(args[0])
        dtype = dtypes[0] if dtypes else source.dtype
        if not isinstance(args[0], OnGpu):
            self._gpu.upload("to", source if kwargs.get("non_blocking", False) else None)
            return OnGpu(source.to(dtype, copy=True))
        if devices and devices[0].type == "cpu":
            self._gpu.wait("download")
            return source.to(dtype, copy=True)
        on_gpu: Tensor = args[0]
        return on_gpu if dtype == source.dtype else OnGpu(source.to(dtype))


def with_index(value: Any) -> Any:
    """torch.device("cuda") and "cuda" as cuda:0."""
    if isinstance(value, str) and value in ("cpu", "cuda"):
        value = torch.device(value)
    return CUDA if isinstance(value, torch.device) and value.type == "cuda" else value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Of everything in lists, tuples and dictionaries, as torch's tree_map, which was a third of the time."""
    if isinstance(value, list | tuple):
        return type(value)([mapped(function, part) for part in value])
    if isinstance(value, dict):
        return {name: mapped(function, part) for name, part in value.items()}
    return function(value)


def tensors_of(value: Any) -> list[Tensor]:
    """All in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def held_of(values: Any) -> Any:
    return mapped(lambda value: value.held if isinstance(value, OnGpu) else value, values)


def check(gpu: Gpu, name: str, args: Any, everything: Any) -> None:
    """What a GPU refuses of one operation, and what it waits for."""
    tensors = tensors_of(everything)
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    base = name.partition(".")[0]
    if base in INDEXED:
        if not isinstance(args[0], OnGpu):
            raise RuntimeError(f"{name}: indices on cuda:0 of a tensor on the CPU")
        indices = [index for index in args[1] if index is not None]
        strangers = [tensor for tensor in strangers if not any(tensor is index for index in indices)]
        for index in indices:
            if not isinstance(index, OnGpu):
                gpu.upload(f"indices of {name}")
            if index.dtype in (torch.bool, torch.uint8):
                gpu.wait(f"mask of {name}")
    if any(tensor.ndim or base in NO_NUMBERS for tensor in strangers):
        found = [f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {', '.join(found)}")
    if name in SYNCS or base in SYNCS:
        gpu.wait(name)


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation of torch, on the pretended device or not."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch does not ask for a driver below such a mode

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        tensors = tensors_of((args, kwargs))
        on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
        is_pinned = bool(kwargs.pop("pin_memory", False))
        if name in ("_to_copy", "copy_"):
            self._count_copy(name, tensors, asked, kwargs.get("non_blocking", False) or (*args, False, False)[2])
        elif on_gpu:
            check(self._gpu, f"{name}.{func._overloadname}" if func._overloadname else name, args, (args, kwargs))
        given = held_of((args, kwargs))
        result = func(*given[0], **given[1])
        if func._schema.is_mutable and name.endswith("_"):
            return args[0]
        if name == "empty" or name.startswith("new_empty") or name in ("empty_like", "empty_strided"):
            result.zero_()
        if is_pinned:
            self._gpu.pinned.append(result)
        to_gpu = on_gpu if asked is None else torch.device(asked).type == "cuda"
        return mapped(lambda value: OnGpu(value) if to_gpu and isinstance(value, Tensor) else value, result)

    def _count_copy(self, name: str, tensors: Sequence[Tensor], asked: Any, is_async: bool) -> None:
        source = tensors[-1]
        kind = source.device.type if asked is None else torch.device(asked).type
        target = tensors[0].device.type if name == "copy_" else kind
        if source.device.type == "cuda" and target == "cpu":
            if is_async and name == "copy_" and self._gpu.is_pinned(tensors[0]):
                self._gpu.downloads.append(name)
            else:
                self._gpu.wait(f"download by {name}")
        elif source.device.type == "cpu" and target == "cuda":
            self._gpu.upload(name, source if is_async else None)


class Event:
    """What the host waits for."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self._gpu.wait("event")


class Kernel:
    """In place of a compiled kernel: looks at what it is launched with."""

    def __init__(self, gpu: Gpu, name: str, real: Any, types: dict[str, set[str]]) -> None:
        self._gpu, self._name, self._real, self._types = gpu, name, real, types

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._launch(grid, args, kwargs)

    def _launch(self, grid: tuple[int, ...], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        assert all(0 < size <= most for size, most in zip(grid, MAX_GRID, strict=False)), (self._name, grid)
        names = self._real.arg_names
        given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in kwargs if name in names}
        options = {name: value for name, value in kwargs.items() if name not in names}
        assert given.keys() == set(names), (self._name, given.keys() ^ set(names))
        assert len(args) + len(kwargs) == len(given) + len(options), (self._name, "given twice")
        assert options.keys() <= OPTIONS, (self._name, options)
        kinds, seen = [], set()
        for parameter in self._real.params:
            value = given[parameter.name]
            kinds.append(self._kind(parameter, value, is_read=id(value) not in seen))
            if isinstance(value, Tensor):
                seen.add(id(value))  # further on it stands for what is not read
        self._gpu.launches.append(Launched(self._name, grid, (self._name, *kinds, *sorted(options.items()))))

    def _kind(self, parameter: Any, value: Any, is_read: bool) -> Any:
        what = f"{parameter.name} of {self._name}"
        if parameter.is_constexpr:
            assert isinstance(value, int | float), (what, value)
            return value
        if isinstance(value, Tensor):
            assert isinstance(value, OnGpu), f"{what} is on the CPU"
            assert value.is_contiguous(), f"{what} has gaps: {value.shape}, {value.stride()}"
            kind = f"*{TYPES[value.dtype]}"
            allowed = self._types.get(parameter.name, set())
            assert kind in allowed or not is_read, (
                f"{what} is {kind}, and only {sorted(allowed)} are compiled by a test"
            )
            return kind, value.held.storage_offset() * value.itemsize % ALIGNMENT == 0
        if isinstance(value, float):
            assert "fp32" in self._types.get(parameter.name, set()), f"{what} is a float"
            return "fp32"
        assert isinstance(value, int), (what, value)
        assert -(2**31) <= value < 2**31, (what, value)
        return "i32" if parameter.do_not_specialize else ("i32", value == 1, value % ALIGNMENT == 0)


def modules(package: Any, ending: str = "") -> list[Any]:
    names = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name.endswith(ending)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def compiled_types() -> dict[str, dict[str, set[str]]]:
    """Kernel -> parameter -> the types that tests compile it for."""
    found: dict[str, dict[str, set[str]]] = {}
    for source in modules(tests.kernels, "_compile"):
        for case in source.cases():
            of_kernel = found.setdefault(f"{case.module}.{case.kernel}", {})
            for parameter, kind in case.types.items():
                of_kernel.setdefault(parameter, set()).add(kind)
    for of_kernel in found.values():
        for name in PARAMETERS & of_kernel.keys():
            of_kernel[name] |= FLOATS
    for kernel, parameters in MORE.items():
        for name, more in parameters.items():
            found[kernel].setdefault(name, set()).update(more)
    return found


def held_bytes() -> int:
    """Of all tensors on the device that are alive."""
    storages = [value.held.untyped_storage() for value in gc.get_objects() if type(value) is OnGpu]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _record(recorder: Any, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As a CUDA graph: run once, recorded once, and nothing of Python is run again."""
    step()
    recorder.gpu.is_recording = True
    try:
        out = step()
    finally:
        recorder.gpu.is_recording = False
    return lambda: out


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """torch and our kernels believe in an H100."""
    gpu, types = Gpu(), compiled_types()
    for module in modules(kernels.gpu):
        name = module.__name__.rpartition(".")[2]
        for attribute, value in list(vars(module).items()):
            if hasattr(value, "arg_names") and f"{name}.{attribute}" in types:
                patch.setattr(
                    module, attribute, Kernel(gpu, f"{name}.{attribute}", value, types[f"{name}.{attribute}"])
                )
    patch.setattr(torch.cuda, "Event", lambda: Event(gpu))
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU that is not there")
    patch.setattr(
        torch.cuda, "mem_get_info", lambda *_: (FREE_BYTES - (held_bytes() if gpu.is_weighed else 0), FREE_BYTES)
    )
    patch.setattr(CudaRecorder, "__init__", lambda self: setattr(self, "gpu", gpu))
    patch.setattr(CudaRecorder, "record", _record)
    with Asked(gpu), Dispatched(gpu):
        yield gpu
