"""How one step's rows are cut into tiles and parts for the attention kernels (kernels/gpu/attention.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import AttentionInputs

MIN_COLUMNS = 16  # of a tile
LONGEST = 1 << 30  # tokens; stands for any longer window


@dataclass(frozen=True)
class Tiling:
    """The constants of one kernel on one layer."""

    group: int  # G: query heads that share a kv head
    split: int  # positions; a multiple of every page size

    @property
    def columns(self) -> int:
        return max(MIN_COLUMNS, 1 << (self.group - 1).bit_length())

    @property
    def rows(self) -> int:
        """Query rows of a tile. The same for prompts and decode steps, so that products have one shape."""
        return self.columns // self.group


@dataclass(frozen=True)
class Launch:
    """Tiles that are cut alike."""

    tiles: Tensor  # [num_tiles, 6] int32: sequence, query row, row of the parts, position, rows, window
    rows: Tensor  # [num_rows, 2] int32: query row, parts in use
    num_parts: int  # of a row, room for
    splits_per_part: int


def launches(inputs: AttentionInputs, tiling: Tiling, windows: tuple[int, ...], device: torch.device) -> list[Launch]:
    """A decode step's rows have a part for each split, so that many programs share a context; rows of prompts, which
    are many programs already, have one part. Made for the first layer of a step and kept in `inputs.prepared`."""
    key = ("triton", tiling, windows)
    made: list[Launch] | None = inputs.prepared.get(key)
    if made is None:
        counts = [stop - start for start, stop in zip(inputs.query_starts, inputs.query_starts[1:], strict=False)]
        spread = [i for i, count in enumerate(counts) if 0 < count <= tiling.rows]
        whole = [i for i, count in enumerate(counts) if count > tiling.rows]
        made = inputs.prepared[key] = [
            _launch(inputs, tiling, windows, chosen, device) for chosen in (spread, whole) if chosen
        ]
    return made


def _launch(
    inputs: AttentionInputs, tiling: Tiling, windows: tuple[int, ...], chosen: list[int], device: torch.device
) -> Launch:
    tiles: list[tuple[int, ...]] = []
    rows: list[tuple[int, int]] = []
    is_whole = inputs.query_starts[chosen[0] + 1] - inputs.query_starts[chosen[0]] > tiling.rows
    for i in chosen:
        start, stop = inputs.query_starts[i], inputs.query_starts[i + 1]
        first = inputs.context_lens[i] - (stop - start)  # position of the sequence's first row
        for row in range(start, stop, tiling.rows):
            num_rows = min(tiling.rows, stop - row)
            tiles.append((i, row, len(rows), first + row - start, num_rows, min(windows[i], LONGEST)))
            positions = range(first + row - start, first + row - start + num_rows)
            rows += [(row + j, 1 if is_whole else at // tiling.split + 1) for j, at in enumerate(positions)]
    num_parts = max(used for _, used in rows)
    splits = max(inputs.context_lens[i] - 1 for i in chosen) // tiling.split + 1
    return Launch(
        torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True),
        torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True),
        num_parts,
        splits if is_whole else 1,
    )


def refill(held: AttentionInputs, step: AttentionInputs) -> None:
    """Put a step's tiles where the recorded kernels of `held` read theirs. Both have the same number of sequences, one
    row each; contexts of `step` are no longer than those that `held` was prepared with. Mutates held.prepared."""
    host = torch.device("cpu")
    for (_, tiling, windows), made in held.prepared.items():
        for target, source in zip(made, launches(step, tiling, windows, host), strict=True):
            target.tiles.copy_(source.tiles, non_blocking=True)
            target.rows.copy_(source.rows, non_blocking=True)
