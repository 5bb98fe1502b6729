"""The llama.cpp side of a comparison:  python -m benchmarks.peers.llama_cpp, in an environment with its packages.

Everything goes through llama.cpp's own C interface, as its llama-bench does: one llama_decode is one step, and a step
ends when the logits are there. Where llama.cpp has a choice that no user should have to know (flash attention, one
cache for all sequences or one each), each is tried and the fastest is measured.
"""

import ctypes
import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as lib

from benchmarks.peers.gguf_files import HEAD, matrix_bytes, stored_type, wanted_type, write_gguf
from benchmarks.peers.protocol import Refused, Setup, answer_requests
from benchmarks.shapes import SHAPES, Shape

CACHE_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}
CACHE_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # of one element
UBATCH = 512  # tokens; llama.cpp's default
TRIALS = 3  # of each choice; the best counts
WARM_TOKEN = 5


@dataclass(frozen=True)
class Choice:
    """Settings that change nothing but speed."""

    flash: bool
    unified: bool

    def __str__(self) -> str:
        return f"flash attention {'on' if self.flash else 'off'}, {'one cache' if self.unified else 'a cache each'}"

    @staticmethod
    def parse(text: str) -> "Choice":
        return Choice(flash="attention on" in text, unified="one cache" in text)


class Context:
    """A llama_context, and the work it repeats."""

    def __init__(self, model: Any, setup: Setup, choice: Choice) -> None:
        work = setup.work
        self._work = work
        if setup.cache not in CACHE_TYPES:
            raise Refused(f"llama.cpp has no {setup.cache!r} cache here: use one of {', '.join(CACHE_TYPES)}")
        self._handle = lib.llama_init_from_model(model, _context_params(setup, choice))
        if not self._handle:
            raise Refused(f"llama.cpp cannot make a context with {choice} and a {setup.cache} cache")
        self._memory = lib.llama_get_memory(self._handle)
        self._batch = lib.llama_batch_init(max(work.num_positions, work.batch), 0, 1)
        if not work.prefill:
            for sequence in range(work.batch):
                self._prefill(sequence, work.context)

    def run(self) -> tuple[float, int]:
        """Do the work once; returns (seconds, tokens). The cache is then as before."""
        work = self._work
        if work.prefill:
            started = time.perf_counter()
            self._prefill(0, work.prefill)
            seconds = time.perf_counter() - started
            lib.llama_memory_seq_rm(self._memory, 0, 0, -1)
            return seconds, work.prefill
        started = time.perf_counter()
        for step in range(work.tokens):
            self._decode([(WARM_TOKEN + step, work.context + step, sequence, True) for sequence in range(work.batch)])
        seconds = time.perf_counter() - started
        for sequence in range(work.batch):
            lib.llama_memory_seq_rm(self._memory, sequence, work.context, -1)
        return seconds, work.tokens * work.batch

    def close(self) -> None:
        lib.llama_batch_free(self._batch)
        lib.llama_free(self._handle)

    def _prefill(self, sequence: int, num_tokens: int) -> None:
        self._decode([(WARM_TOKEN + i % 1000, i, sequence, i == num_tokens - 1) for i in range(num_tokens)])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One llama_decode of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if (status := lib.llama_decode(self._handle, batch)) != 0:
            raise Refused(f"llama_decode failed with status {status}")
        lib.llama_get_logits_ith(self._handle, -1)  # waits for the step


class LlamaCpp:
    """A model in llama.cpp: protocol.Model."""

    def __init__(self, setup: Setup) -> None:
        self._loaded = _Loaded(setup)
        choice = Choice.parse(setup.prepared)
        self._context = Context(self._loaded.handle, setup, choice)
        self._context.run()  # the first run touches memory for the first time
        shape, weight_type = _shape(setup), wanted_type(setup)
        self.facts = {
            "name": "llama.cpp",
            "versions": {package: importlib.metadata.version(package) for package in ("llama-cpp-python", "gguf")},
            "features": lib.llama_print_system_info().decode().strip(" |"),
            "shape": setup.shape,
            "num_layers": shape.num_layers,
            **_bytes_of(shape, weight_type, setup),
            "settings": {"fastest of those tried": str(choice)},
            "notes": [*_fallback_notes(shape, weight_type), *self._loaded.log.notes()],
        }

    def measure(self) -> tuple[float, int]:
        return self._context.run()


def prepare(setup: Setup) -> str:
    """Write the file when it is not there; return the fastest of the choices that can be had, as Choice.parse reads it.

    Raises Refused for formats that llama.cpp does not have.
    """
    path = _path(setup)
    if not path.is_file():
        write_gguf(path, _shape(setup), wanted_type(setup))
    loaded = _Loaded(setup)
    flashes = (True,) if setup.cache != "f16" else (False, True)  # a quantized value cache needs flash attention
    unifieds = (True, False) if setup.work.batch > 1 else (True,)
    seconds: dict[Choice, float] = {}
    for choice in (Choice(flash, unified) for flash in flashes for unified in unifieds):
        context = Context(loaded.handle, setup, choice)
        seconds[choice] = min(context.run()[0] for _ in range(TRIALS))
        context.close()
    return str(min(seconds, key=lambda choice: seconds[choice]))


class _Loaded:
    """A file in memory."""

    def __init__(self, setup: Setup) -> None:
        self.log = _Log()  # llama.cpp keeps a pointer to its callback
        lib.llama_log_set(self.log.callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
        path = _path(setup)
        self.handle = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.handle:
            raise Refused(f"llama.cpp cannot load {path}: {self.log.tail()}")


class _Log:
    """What llama.cpp reports while it loads."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self.callback = lib.llama_log_callback(self._hear)

    def _hear(self, _level: int, text: bytes, _data: Any) -> None:
        self._lines.append(text.decode(errors="replace").rstrip())

    def tail(self) -> str:
        return " | ".join(self._lines[-5:])

    def notes(self) -> list[str]:
        """Where the weights ended up: a CPU_REPACK buffer holds those laid out anew for this processor."""
        return [line.split(":", 1)[-1].strip() for line in self._lines if "model buffer size" in line]


def _shape(setup: Setup) -> Shape:
    return SHAPES[setup.shape].with_layers(setup.num_layers)


def _path(setup: Setup) -> Path:
    shape = _shape(setup)
    return Path(setup.folder) / f"{setup.shape}-{shape.num_layers}-{wanted_type(setup)}.gguf"


def _context_params(setup: Setup, choice: Choice) -> Any:
    work = setup.work
    params = lib.llama_context_default_params()
    positions = -(-(work.num_positions + 1) // 256) * 256
    params.n_ctx = positions * work.batch
    params.n_batch = max(positions, UBATCH)
    params.n_ubatch = UBATCH
    params.n_seq_max = work.batch
    params.n_threads = params.n_threads_batch = setup.threads
    params.type_k = params.type_v = CACHE_TYPES[setup.cache]
    params.flash_attn_type = int(choice.flash)
    params.kv_unified = choice.unified
    params.no_perf = True
    return params


def _bytes_of(shape: Shape, weight_type: str, setup: Setup) -> dict[str, Any]:
    """What a step must read, by the sizes of ggml's blocks."""
    sizes = shape.linears().values()
    layer = sum(matrix_bytes(stored_type(weight_type, columns), rows, columns) for rows, columns in sizes)
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * CACHE_BYTES[setup.cache]
    return {
        "weights": weight_type,
        "bits_per_weight": shape.num_layers * layer * 8 / shape.layer_weights,
        "layer_bytes": shape.num_layers * layer,
        "head": HEAD,
        "head_bytes": matrix_bytes(HEAD, shape.vocab, shape.hidden),
        "cache": setup.cache,
        "cache_bytes_per_token": cache,
    }


def _fallback_notes(shape: Shape, weight_type: str) -> list[str]:
    """Matrices that llama.cpp's quantizer stores in another type than was asked for."""
    fallen: dict[tuple[int, str], list[str]] = {}
    for role, (_, columns) in shape.linears().items():
        stored = stored_type(weight_type, columns)
        if stored != weight_type:
            fallen.setdefault((columns, stored), []).append(role)
    return [
        f"{', '.join(roles)} have {columns} inputs, no multiple of 256: {stored}, as llama.cpp's quantizer chooses"
        for (columns, stored), roles in fallen.items()
    ]


if __name__ == "__main__":
    answer_requests(prepare, LlamaCpp)
