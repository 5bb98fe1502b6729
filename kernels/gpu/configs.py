"""How a call is cut into programs: shipped tables, by GPU, matrix and rows. Nothing is tuned while requests wait.

A table is a JSON file of kernels/gpu/tables, chosen by the name of the GPU when weights are packed; `default` serves
GPUs that have none. Its figures come from what compiles without spilling for sm_80, sm_90 and sm_100
(tests/kernels/gpu_budget.json), from instructions counted in what the compiler made
(benchmarks/gpu_instructions.py) and from counting programs and bytes; none has been timed on a GPU yet.
`python -m benchmarks.gpu_tune --write` times others on a GPU and writes its table, in this form:

    gpus    names, as torch has them, of the GPUs that it serves, and their compute capability as `architecture`: 90
    fixed   the entry of "triton-fixed", for any number of rows
    rules   each for some codes ("4-bit", "e2m1", "lookup", null for all) in matrices of up to so many outputs and
            inputs (null for any), with entries in order of max_tokens, null at the end. The first that fits serves.
            microseconds of an entry are what the default one took and what it took.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tables"
DEFAULT = "default"
ANY = 1 << 30
MIN_BLOCKS = 2  # of a split: less would be all prologue
MAX_SPLITS = 16
ROWS = {"few": (8, 16), "many": (16, 32, 64, 128, 256)}  # block_m that a kernel can have
WEIGHTS = (16, 32, 64, 128, 256)  # block_n likewise
WARPS = (1, 2, 4, 8)
MAX_STAGES = 8
CODES = ("2-bit", "3-bit", "4-bit", "8-bit", "e2m1", "lookup")


@dataclass(frozen=True)
class Config:
    """One specialization of a kernel for up to max_tokens rows. Raises ValueError for what no kernel can be."""

    kernel: str  # "few" or "many"
    max_tokens: int  # rows of activations
    block_m: int  # rows of activations in a program
    block_n: int  # rows of weights in a program
    num_warps: int  # two keep mma.sync on sm_90, whose operands need no fences: 1.9 instructions a weight, wgmma 4.5
    num_stages: int  # loads under way ahead of the products
    min_programs: int  # channels are split until there are so many; 256 are two for each multiprocessor of an H100

    def __post_init__(self) -> None:
        if self.kernel not in ROWS:
            raise ValueError(f"kernel is {self.kernel!r}, must be one of {', '.join(ROWS)}")
        allowed = (("block_m", ROWS[self.kernel]), ("block_n", WEIGHTS), ("num_warps", WARPS))
        for name, among in (*allowed, ("num_stages", range(1, MAX_STAGES + 1))):
            if getattr(self, name) not in among:
                raise ValueError(f"{name} of {self.kernel!r} is {getattr(self, name)}, must be one of {list(among)}")
        for name in ("max_tokens", "min_programs"):
            if not 1 <= getattr(self, name) <= ANY:
                raise ValueError(f"{name} is {getattr(self, name)}, must be positive")

    def __str__(self) -> str:
        return f"{self.kernel} {self.block_m} x {self.block_n}, {self.num_warps} warps, {self.num_stages} stages"


@dataclass(frozen=True)
class Rule:
    """Entries for one class of matrices."""

    codes: str | None  # one of CODES, None for all
    max_out_features: int
    max_in_features: int
    configs: tuple[Config, ...]  # in order of max_tokens, the last for ANY

    def __post_init__(self) -> None:
        if self.codes is not None and self.codes not in CODES:
            raise ValueError(f"codes are {self.codes!r}, must be one of {', '.join(CODES)} or null")
        bounds = [config.max_tokens for config in self.configs]
        if not bounds or bounds[-1] != ANY or sorted(set(bounds)) != bounds:
            raise ValueError(f"max_tokens of configs are {bounds}, must rise and end with null")

    def fits(self, codes: str, out_features: int, in_features: int) -> bool:
        is_small = out_features <= self.max_out_features and in_features <= self.max_in_features
        return is_small and self.codes in (None, codes)


@dataclass(frozen=True)
class Configs:
    """What serves one matrix."""

    entries: tuple[Config, ...]
    fixed: Config
    note: str  # which table that is, for the start screen

    def of(self, num_tokens: int, fixed: bool = False) -> Config:
        return self.fixed if fixed else next(one for one in self.entries if num_tokens <= one.max_tokens)


@dataclass(frozen=True)
class ConfigTable:
    """One shipped file."""

    name: str  # of the file
    gpus: tuple[str, ...]
    architecture: int | None  # compute capability of these GPUs, 90; None: any
    fixed: Config
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not any(rule.fits(CODES[0], ANY, ANY) and rule.codes is None for rule in self.rules):
            raise ValueError("rules must end with one for all codes and matrices of any size")

    def configs_for(self, codes: str, out_features: int, in_features: int, note: str = "") -> Configs:
        rule = next(rule for rule in self.rules if rule.fits(codes, out_features, in_features))
        return Configs(rule.configs, self.fixed, note)

    def entries(self) -> Iterator[tuple[str | None, Config]]:
        """Every entry with the codes that it serves; the fixed one serves all."""
        yield None, self.fixed
        for rule in self.rules:
            for config in rule.configs:
                yield rule.codes, config


def read_table(path: Path) -> ConfigTable:
    """Raises ValueError, naming the file, where it is no table."""
    try:
        found = json.loads(path.read_text())
        rules = tuple(_rule(rule) for rule in found["rules"])
        _check_names(found, ("gpus", "architecture", "fixed", "rules", "measured"))
        return ConfigTable(path.stem, tuple(found["gpus"]), found["architecture"], _config(found["fixed"]), rules)
    except (KeyError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path.name} is no table of configurations: {what}") from error


def _rule(found: Mapping[str, Any]) -> Rule:
    _check_names(found, [field.name for field in fields(Rule)])
    outs, ins = (ANY if found[name] is None else int(found[name]) for name in ("max_out_features", "max_in_features"))
    return Rule(found["codes"], outs, ins, tuple(_config(config) for config in found["configs"]))


def _config(found: Mapping[str, Any]) -> Config:
    _check_names(found, (*(field.name for field in fields(Config)), "microseconds"))
    values = {field.name: found[field.name] for field in fields(Config)}
    return Config(**values | {"max_tokens": ANY if values["max_tokens"] is None else values["max_tokens"]})


def _check_names(found: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := found.keys() - set(known):
        raise ValueError(f"it has {', '.join(sorted(unknown))}, known are {', '.join(known)}")


def written(config: Config) -> dict[str, Any]:
    """An entry as a file has it."""
    return asdict(config) | {"max_tokens": None if config.max_tokens == ANY else config.max_tokens}


@cache
def tables() -> tuple[ConfigTable, ...]:
    """Every shipped table, the default one first. Raises ValueError where one is damaged or two serve one GPU."""
    found = [read_table(path) for path in sorted(FOLDER.glob("*.json"))]
    served = [gpu for table in found for gpu in table.gpus]
    if len(set(served)) != len(served):
        raise ValueError(f"two tables of configurations serve one GPU: {', '.join(sorted(served))}")
    return tuple(sorted(found, key=lambda table: table.name != DEFAULT))


def configs_for(device: torch.device, codes: str, out_features: int, in_features: int) -> Configs:
    """What serves a matrix on `device`, chosen when it is packed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    table = next((table for table in tables() if name in table.gpus), tables()[0])
    note = f"configurations of kernels were measured on {name}"
    if table.name == DEFAULT:
        note = f"no configurations of kernels were measured on {name or device}: the default ones serve"
    return table.configs_for(codes, out_features, in_features, note)


@cache
def default_configs() -> Configs:
    """What serves a matrix of any codes and size on a GPU without a table."""
    return tables()[0].configs_for(CODES[0], ANY, ANY)


@dataclass(frozen=True)
class Grid:
    """The programs of one call."""

    config: Config
    tiles_m: int
    tiles_n: int
    num_splits: int  # parts of the channels, summed in order afterwards
    blocks_per_split: int


def grid_for(
    num_tokens: int, out_features: int, num_blocks: int, fixed: bool = False, configs: Configs | None = None
) -> Grid:
    """Splits depend on the matrix and the table's entry alone, so that within an entry no row depends on the batch;
    with `fixed` there is one entry for any number of rows. Without `configs` the default table's serve."""
    return grid_of((configs or default_configs()).of(num_tokens, fixed), num_tokens, out_features, num_blocks)


def grid_of(config: Config, num_tokens: int, out_features: int, num_blocks: int) -> Grid:
    tiles_n = -(-out_features // config.block_n)
    splits = 1
    while splits < MAX_SPLITS and tiles_n * splits < config.min_programs and num_blocks >= 2 * splits * MIN_BLOCKS:
        splits *= 2
    per_split = -(-num_blocks // splits)
    return Grid(config, -(-num_tokens // config.block_m), tiles_n, -(-num_blocks // per_split), per_split)
