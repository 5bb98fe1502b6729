"""What the sampling kernels cost once compiled; tests/kernels/gpu_compile.py says how.

python -m tests.kernels.gpu_sampling_compile     compiles every case anew and writes gpu_sampling_budget.json

Vocabularies are no constant of theirs: what is compiled serves 32,000, 128,256 and 151,936 ids alike, and all up to
262,144. One that is no multiple of 16 is loaded id by id.
"""

from collections.abc import Iterator
from pathlib import Path

from kernels.sampling import gpu
from tests.kernels.gpu_compile import ARCHITECTURES, Case, record

BUDGET = Path(__file__).parent / "gpu_sampling_budget.json"
TYPES = {
    "logits": "*fp32",
    "draws": "*fp64",
    "best": "*fp32",
    "sums": "*fp64",
    "rooms": "*i64",
    **dict.fromkeys(("first", "counts", "ids"), "*i32"),
}


def cases() -> Iterator[Case]:
    sizes = gpu.constants(gpu.PIECE, gpu.ROOM)
    for architecture in ARCHITECTURES:
        for kernel, fixed in sizes.items():
            yield Case(kernel, architecture, "sampling", kernel, TYPES, fixed, gpu.NUM_WARPS)
    for kernel in ("largest", "weigh"):  # all of a row's logits go through these
        fixed = sizes[kernel]
        yield Case(f"{kernel}, any vocabulary", 90, "sampling", kernel, TYPES, fixed, gpu.NUM_WARPS, sizes=())


if __name__ == "__main__":
    record(BUDGET, cases())
