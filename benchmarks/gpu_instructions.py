"""What a GPU's kernels for weights cost once compiled, without a GPU: instructions a weight, registers, shared memory.

python -m benchmarks.gpu_instructions [--arch 90] [--json]

compiles every code width with every entry of the shipped table and counts the instructions of the loop over channels in
the machine code. Issue slots are a limit as bandwidth is: a GPU of M multiprocessors with 128 lanes at f Hz has 128 M f
of them a second, and reads B / (b / 8) weights of b bits in that time. Logic, shifts and integer sums have half of the
lanes (CUDA C++ Programming Guide, throughput of native arithmetic instructions, compute capability 8.0 to 9.0). `issue`
is how much of the bandwidth of an H200 (M = 132, f = 1.755 GHz, B = 4.3e12 bytes/s) the loop could use if nothing else
held it up. Products of many rows are bound by tensor cores instead.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from kernels import gpu
from kernels.gpu.packing import Packed
from tests.kernels.gpu_compile import MATRICES, Case, K, N, build, dump, every_case, resources

SLOTS_PER_SECOND = 132 * 128 * 1.755e9
BYTES_PER_SECOND = 4.3e12
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HALF_RATE = ("LOP3", "SHF", "PRMT", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "IMNMX", "VIMNMX")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Cost:
    """One specialization."""

    case: str
    bits: float  # of a weight, parameters included
    instructions: float  # a weight
    half_rate: float  # of these, for which there are half as many lanes
    registers: int  # a thread
    stack: int  # bytes that are spilled
    shared: int  # bytes a program

    @property
    def issue(self) -> float:
        """Of an H200's bandwidth."""
        slots = max(self.instructions, 2 * self.half_rate)
        return SLOTS_PER_SECOND / slots / (BYTES_PER_SECOND / (self.bits / 8))


def longest_loop(assembly: str) -> list[str]:
    """The instructions of the longest loop, by name. Raises ValueError where there is none."""
    found = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(assembly)]
    positions = {at: i for i, (at, _, _) in enumerate(found)}
    loops: list[range] = []
    for i, (at, name, rest) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and 0 < int(target[1], 16) < at:
            loops.append(range(positions[int(target[1], 16)], i + 1))
    if not loops:
        raise ValueError("the kernel has no loop")
    return [found[i][1].partition(".")[0] for i in max(loops, key=len)]


def cost(case: Case, packed: Packed) -> Cost:
    built = build(case)
    used, fixed = resources(built), case.constants
    weights = fixed["BLOCK_N"] * fixed["PLANE"] * fixed["PLANES"] / (32 * case.num_warps)  # of a thread and iteration
    loop = longest_loop(dump(built, "-sass"))
    half_rate = sum(name in HALF_RATE for name in loop) / weights
    bits = 8 * packed.num_bytes / (N * K)
    return Cost(str(case), bits, len(loop) / weights, half_rate, *asdict(used).values())


def costs(architecture: int) -> Iterator[Cost]:
    for name, case in every_case(architecture):
        yield cost(case, MATRICES[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90, help="compute capability")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if gpu.MISSING is not None:
        raise SystemExit(gpu.MISSING)
    for found in costs(options.arch):
        if options.json:
            print(json.dumps(asdict(found) | {"issue": found.issue}), flush=True)
        else:
            print(
                f"{found.case:58} {found.bits:5.2f} bits {found.instructions:6.2f} instructions a weight, "
                f"{found.half_rate:5.2f} at half rate, issue {100 * found.issue:4.0f} %, "
                f"{found.registers:3} registers, {found.stack} bytes spilled, {found.shared:6} shared",
                flush=True,
            )


if __name__ == "__main__":
    main()
