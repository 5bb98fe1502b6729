"""What `benchmarks.gpu_tune` tries, chooses and writes, with invented times."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_tune
from benchmarks.gpu_timing import Case
from benchmarks.gpu_tune import GAIN, Found, main, search, splits, stages, table_of, tiles, write_table
from kernels.gpu import configs
from kernels.gpu.configs import ANY, CODES, Config, ConfigTable, Grid, configs_for, default_configs, read_table, written
from kernels.gpu.packing import Packed
from tests.kernels import gpu_compile
from tests.kernels.gpu_checks import check_names
from tests.kernels.gpu_compile import BUDGET, measured_cases

GPU = "NVIDIA H200 (invented)"
START = default_configs().entries[0]


def times(best: Config, broken: Sequence[Config] = ()) -> Mapping[Config, float]:
    """Microseconds of everything around the default entry: 2 more for each thing in which it is not `best`."""
    every = {START, *tiles(best), *stages(best), *splits(best), *tiles(START), *stages(START), *splits(START)}

    def differing(config: Config) -> int:
        mine, other = written(config), written(best)
        return sum(mine[name] != other[name] for name in mine)

    return {config: 10.0 + 2 * differing(config) for config in every if config not in broken}


def searched(best: Config, broken: Sequence[Config] = ()) -> Found:
    known = times(best, broken)
    return search(START, lambda tried: {one: known[one] for one in tried if one in known})


def test_the_fastest_is_found_one_thing_after_the_other() -> None:
    """Bug: stages varied around the default entry, not around the best tiles."""
    best = replace(START, block_n=128, num_warps=4, num_stages=5, min_programs=512)
    assert searched(best) == Found(best, 10.0, 18.0)


def test_what_cannot_run_is_left_out_and_a_small_gain_is_none() -> None:
    """Bugs: an entry that spills chosen; a table that follows the noise. The default entry itself must run."""
    best = replace(START, num_stages=5)
    assert searched(best, broken=[best]).config == START
    near = {START: 10.0, best: 10.0 * (1 - GAIN) + 0.01}
    assert search(START, lambda tried: {one: near.get(one, 11.0) for one in tried}).config == START
    with pytest.raises(ValueError, match="cannot run: few 8 x 64"):
        search(START, lambda tried: {one: 1.0 for one in tried if one != START})


@pytest.mark.parametrize("start", default_configs().entries, ids=str)
def test_candidates_are_entries_that_a_table_may_have(start: Config) -> None:
    """Config refuses others. Bug: the default entry not among them, so that nothing is ever as good."""
    for vary in (tiles, stages):
        assert start in set(vary(start))
    assert len({*tiles(start), *stages(start), *splits(start)}) < 30  # each is compiled, for seconds


class Clock:
    """A program of 32 rows of weights takes 1 ms, others 2."""

    def trial(self, cases: Sequence[Case]) -> list[float]:
        return [1.0 if "x 32," in case.name else 2.0 for case in cases]

    def wait(self) -> None: ...


@pytest.mark.parametrize("codes", CODES)
def test_what_spills_or_fails_is_not_timed(codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of codes can be made; two entries that cut a matrix alike are timed once."""
    failing = {1: "too much shared memory", 2: None, 3: "spills"}

    def launched(x: torch.Tensor, packed: Packed, y: torch.Tensor, grid: Grid) -> Any:
        assert (x.shape, packed.codes, y.shape) == ((8, 256), codes, (8, 64))
        if failing.get(grid.config.num_stages) == "too much shared memory":
            raise RuntimeError("out of resource")
        return SimpleNamespace(n_spills=4 if failing.get(grid.config.num_stages) == "spills" else 0)

    monkeypatch.setattr(gpu_tune, "launch", launched)
    packed = gpu_tune.random_packed(codes, (64, 256), torch.device("cpu"))
    timed = gpu_tune.timed_with(packed, 8, Clock())
    best, alike = replace(START, block_n=32, num_stages=2), replace(START, min_programs=ANY)
    tried = [START, best, alike, replace(START, num_stages=1), replace(alike, num_stages=2)]
    assert timed(tried) == {best: 1000.0, replace(alike, num_stages=2): 2000.0}


def lines(codes: str, size: tuple[int, int], entries: Sequence[Config]) -> list[dict[str, object]]:
    where = {"codes": codes, "out_features": size[0], "in_features": size[1], "group": f"{codes}, {size}"}
    return [{**where, "config": written(entry), "default": 12.5, "microseconds": 10.0} for entry in entries]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The shipped default table, and whatever a test adds."""
    (tmp_path / "default.json").write_text((configs.FOLDER / "default.json").read_text())
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.tables.cache_clear()
    yield tmp_path
    configs.tables.cache_clear()


def measured(entry: Config, folder: Path) -> ConfigTable:
    """A table in which 4-bit matrices of up to 1024 x 4096 have `entry` first."""
    entries = default_configs().entries
    half = lines("8-bit", (64, 64), entries[:2])  # cut off: not all entries
    found = [*lines("4-bit", (4096, 4096), entries), *half, *lines("4-bit", (1024, 4096), [entry, *entries[1:]])]
    return read_table(write_table(table_of(GPU, 90, found, {"torch": "2.11"}), folder))


def test_a_table_is_written_read_back_and_serves_its_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: the table of another GPU; a small matrix served by the rule of large ones; results that were cut off."""
    entry = replace(START, block_n=32)
    table = measured(entry, folder)
    rules = [(rule.codes, rule.max_out_features) for rule in table.rules]
    assert rules == [("4-bit", 1024), ("4-bit", 4096), (None, ANY)]
    stored = json.loads((folder / "nvidia_h200_invented.json").read_text())
    assert stored["rules"][0]["configs"][0]["microseconds"] == [12.5, 10.0]
    name = GPU
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    chosen = configs_for(device, "4-bit", 1024, 2048)
    assert chosen.of(1) == entry
    assert chosen.of(9) == default_configs().of(9)
    assert chosen.note == "configurations of kernels were measured on NVIDIA H200 (invented)"
    for codes, outs, ins in (("4-bit", 1025, 4096), ("4-bit", 512, 8192), ("e2m1", 1024, 4096)):
        assert configs_for(device, codes, outs, ins).entries == default_configs().entries
    name = "NVIDIA A10"
    assert configs_for(device, "4-bit", 1024, 2048).of(1) == START
    assert configs_for(device, "4-bit", 1024, 2048).note.startswith(
        "no configurations of kernels were measured on NVIDIA"
    )


def test_a_table_whose_entries_are_not_in_the_budget_is_refused(folder: Path) -> None:
    """Every entry of every shipped table is compiled in the gate: for all codes that it serves, and no others."""
    before = {str(case) for case in measured_cases()}
    measured(replace(START, block_n=32), folder)
    configs.tables.cache_clear()
    added = {str(case) for case in measured_cases()} - before
    assert {name for name in added if name.startswith("few 8 x 32")} == {
        f"few 8 x 32, 2 warps, 3 stages, {codes}, sm_90" for codes in ("4-bit g128", "4-bit nested g32")
    }
    with pytest.raises(AssertionError):
        check_names(BUDGET, gpu_compile.cases())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_n": 48}, r"block_n of 'few' is 48, must be one of \[16, 32"),
        ({"kernel": "most"}, "kernel is 'most', must be one of few, many"),
        ({"num_warps": "2"}, "num_warps of 'few' is 2, must be one of"),
        ({"max_tokens": None}, "max_tokens of configs are .*, must rise and end with null"),
        ({"speed": 1}, "it has speed, known are kernel"),
    ],
)
def test_a_damaged_table_is_refused_by_name(change: dict[str, object], message: str, folder: Path) -> None:
    found = json.loads((folder / "default.json").read_text())
    found["rules"][0]["configs"][0] |= change
    path = folder / "broken.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"broken\.json is no table of configurations: {message}"):
        read_table(path)
    found = json.loads((folder / "default.json").read_text())
    del found["rules"][0]["configs"][0]["num_warps"]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="it has no 'num_warps'"):
        read_table(path)


def test_every_kind_of_codes_has_configurations() -> None:
    assert {packed.codes for packed in gpu_compile.MATRICES.values()} == set(CODES)


def test_without_a_gpu_it_ends_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_tune", "--write"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        main()
