"""Which tiles, warps, stages and splits are fastest on this machine's GPU:  python -m benchmarks.gpu_tune --write

For every kind of codes, each size of a model's matrices and each number of rows that the default table tells apart: the
default entry beside other tiles and warps, then the best of them beside other stages, then beside other splits of the
channels, each time in turns with a cold L2 cache (benchmarks/gpu_timing.py). What does not compile, spills registers or
is not 3 % faster is left out.

Results are added to a file, one JSON object a line, as they come. With --write the table of this GPU is written to
kernels/gpu/tables, where it serves from the next start on; kernels/gpu/configs.py says what it holds. Matrices that are
not in the results keep the default entries. Then `python -m tests.kernels.gpu_compile` records what its entries take:
the tests refuse a table with others. Without a CUDA device it ends with a message.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import Case, Clock, Timer, arguments, main_of
from benchmarks.shapes import SHAPES
from benchmarks.workers import Line, Write, lines_of
from kernels.gpu.configs import (
    ANY,
    FOLDER,
    ROWS,
    Config,
    default_configs,
    grid_of,
    read_table,
    written,
)
from kernels.gpu.configs import tables as shipped
from kernels.gpu.multiply import launch
from kernels.gpu.packing import Packed
from kernels.linear.affine.gpu import AffineTriton
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.table import tables
from kernels.linear.table.gpu import TableTriton
from kernels.linear.table.layout import TableWeights

GAIN = 0.03  # of the time, that another entry must save
MOST_ROWS = 1024  # that an entry for any number is timed with
STAGES = (1, 2, 3, 4, 5)
PROGRAMS = (1, 128, 256, 512, 1024)
ROWS_OF_WARP = 16  # of a tile: what a tensor core takes at a time
NUM_TRIALS = 3
GROUPS = {"4-bit": 128, "e2m1": 16, "8-bit": 0, "lookup": 64, "2-bit": 64, "3-bit": 128}  # channels; 0: a whole row

Timed = Callable[[Sequence[Config]], Mapping[Config, float]]  # microseconds of those that can run


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    config: Config
    microseconds: float
    default: float  # microseconds of what it began with


# ---- candidates ------------------------------------------------------------------------------------------------------


def tiles(config: Config) -> Iterator[Config]:
    """Other blocks and warps. A program has all of a few rows, and half as many or twice as many of others."""
    is_few = config.kernel == "few"
    heights = (config.block_m,) if is_few else (config.block_m // 2, config.block_m, 2 * config.block_m)
    widths, warps = ((32, 64, 128), (1, 2, 4)) if is_few else ((64, 128, 256), (4, 8))
    for block_m, block_n, num_warps in product(heights, widths, warps):
        if block_m in ROWS[config.kernel] and block_n >= ROWS_OF_WARP * num_warps:
            yield replace(config, block_m=block_m, block_n=block_n, num_warps=num_warps)


def stages(config: Config) -> Iterator[Config]:
    return (replace(config, num_stages=num_stages) for num_stages in STAGES)


def splits(config: Config) -> Iterator[Config]:
    return (replace(config, min_programs=min_programs) for min_programs in PROGRAMS)


def search(start: Config, timed: Timed) -> Found:
    """The fastest entry that is found by varying one thing after the other. Raises ValueError if `start` cannot run."""
    best = start
    for vary in (tiles, stages, splits):
        times = timed([best, *(other for other in vary(best) if other != best)])
        if best not in times:
            raise ValueError(f"the default entry cannot run: {best}")
        best = faster(best, times)
    times = timed([start, best]) if best != start else times
    best = faster(start, {one: times[one] for one in (start, best)})
    return Found(best, times[best], times[start])


def faster(best: Config, times: Mapping[Config, float]) -> Config:
    """The fastest, if it saves more than times differ by from trial to trial."""
    fastest = min(times, key=times.__getitem__)
    return fastest if times[fastest] < (1 - GAIN) * times[best] else best


# ---- a GPU -----------------------------------------------------------------------------------------------------------


def random_packed(codes: str, shape: tuple[int, int], device: torch.device) -> Packed:
    """(outputs, inputs); random codes, for speed does not depend on them."""
    (n, k), group = shape, GROUPS[codes] or shape[1]
    scales = torch.rand(n, k // group, device=device).half()
    bits = int(codes[0]) if codes[0].isdigit() else 4
    raw = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device)
    if codes == "e2m1":
        return TableTriton().prepare(TableWeights(4, k, group, raw, scales.to(torch.float8_e4m3fn), tables.E2M1))
    if codes == "lookup":
        return TableTriton().prepare(TableWeights(4, k, group, raw, scales, tables.NF4))
    zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.uint8, device=device)
    return AffineTriton().prepare(AffineWeights(bits, k, group, raw, scales, zeros))


def timed_with(packed: Packed, num_rows: int, timer: Timer) -> Timed:
    """Times of entries for products of `num_rows` rows with a matrix."""
    x = torch.randn(num_rows, packed.in_features, device=packed.words.device).bfloat16()
    y = x.new_empty(num_rows, packed.out_features)

    def timed(configs: Sequence[Config]) -> Mapping[Config, float]:
        cases: dict[Config, Case] = {}
        known = set()
        for config in configs:
            grid = grid_of(config, num_rows, packed.out_features, packed.num_blocks)
            if (cut := (str(config), grid.num_splits)) in known:
                continue
            known.add(cut)
            try:
                compiled = launch(x, packed, y, grid)
                timer.wait()
            except Exception:  # too much shared memory, or whatever a compiler may raise
                timer.wait()  # raises again where the device itself is broken
                continue
            if not compiled.n_spills:
                cases[config] = Case(str(config), packed.num_bytes, partial(launch, x, packed, y, grid))
        if not cases:
            return {}
        timer.trial(list(cases.values()))  # warms up
        trials = [timer.trial(list(cases.values())) for _ in range(NUM_TRIALS)]
        return {
            one: 1e3 * statistics.median(times) for one, times in zip(cases, zip(*trials, strict=True), strict=True)
        }

    return timed


def tune(codes: str, shape: tuple[int, int], device: torch.device, timer: Timer, write: Write) -> None:
    """One line for each entry of the default table."""
    packed = random_packed(codes, shape, device)
    for start in default_configs().entries:
        found = search(start, timed_with(packed, min(start.max_tokens, MOST_ROWS), timer))
        name = f"up to {start.max_tokens} rows" if start.max_tokens < ANY else "any rows"
        where = {"codes": codes, "out_features": shape[0], "in_features": shape[1]}
        times = {"default": round(found.default, 1), "microseconds": round(found.microseconds, 1)}
        write({"group": group_name(codes, shape), "name": name, **where, "config": written(found.config), **times})


def group_name(codes: str, shape: tuple[int, int]) -> str:
    return f"{codes}, {shape[0]} x {shape[1]}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def table_of(gpu: str, architecture: int, lines: Iterable[Line], measured: Mapping[str, str]) -> dict[str, Any]:
    """A table of configurations as its file has it, smallest matrices first, the default rules last. Of two results for
    the same the later counts; matrices without all entries are left out."""
    found: dict[tuple[int, int, str], dict[int | None, dict[str, Any]]] = {}
    for line in lines:
        if "config" in line:
            entry = {**line["config"], "microseconds": [line["default"], line["microseconds"]]}
            key = (line["out_features"], line["in_features"], line["codes"])
            found.setdefault(key, {})[entry["max_tokens"]] = entry
    default = json.loads((FOLDER / "default.json").read_text())
    needed = [written(config)["max_tokens"] for config in default_configs().entries]
    rules = []
    for (outs, ins, codes), entries in sorted(found.items(), key=lambda item: (item[0][0] * item[0][1], item[0])):
        if entries.keys() == set(needed):
            sizes = {"codes": codes, "max_out_features": outs, "max_in_features": ins}
            rules.append({**sizes, "configs": [entries[bound] for bound in needed]})
    return {
        "gpus": [gpu],
        "architecture": architecture,
        "measured": dict(measured),
        "fixed": default["fixed"],
        "rules": [*rules, *default["rules"]],
    }


def write_table(table: Mapping[str, Any], folder: Path) -> Path:
    """Write it down and read it back. Raises ValueError where it is no table."""
    path = folder / (re.sub(r"[^a-z0-9]+", "_", table["gpus"][0].lower()).strip("_") + ".json")
    path.write_text(json.dumps(table, indent=1) + "\n")
    read_table(path)
    return path


def main() -> None:
    parser = arguments(__doc__, seconds=1500, group_seconds=300)
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b", help="whose matrices (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="the table of this GPU, from all lines of --out")
    options = parser.parse_args()
    every = {
        group_name(codes, shape): (codes, shape)
        for codes in GROUPS
        for shape in sorted({*SHAPES[options.model].linears().values()})
    }

    def groups() -> Callable[[str], Callable[[Write], None]]:
        device = torch.device("cuda")
        timer = Clock(device)
        return lambda name: partial(tune, *every[name], device, timer)

    main_of("benchmarks.gpu_tune", options, list(every), groups)
    if options.write and not options.worker and not options.list:
        import triton

        major, minor = torch.cuda.get_device_capability()
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        table = table_of(torch.cuda.get_device_name(), 10 * major + minor, lines_of(options.out), versions)
        print(f"{len(table['rules']) - len(shipped()[0].rules)} classes of matrices in {write_table(table, FOLDER)}")


if __name__ == "__main__":
    main()
