"""How one step's rows are cut into tiles and parts for the attention kernels (kernels/gpu/attention.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import transfer
from kernels.contract import AttentionInputs
from kernels.transfer import Parcel, send

MIN_COLUMNS = 16  # of a tile
WIDE_COLUMNS = (
    64  # of a tile of a prompt: 128 take more instructions a query row on sm_80 and sm_100, and more registers
)
ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H200
LONGEST = 1 << 30  # tokens; stands for any longer window


@dataclass(frozen=True)
class Tiling:
    """The constants of one kernel on one layer."""

    group: int  # G: query heads that share a kv head
    split: int  # positions; a multiple of every page size
    num_kv_heads: int = 1
    fixed: bool = False  # whether tiles of prompts are those of decode steps
    least: int = MIN_COLUMNS  # columns of a decode step's tile

    def columns(self, is_wide: bool) -> int:
        return max(WIDE_COLUMNS if is_wide else self.least, 1 << (self.group - 1).bit_length())

    def rows(self, is_wide: bool) -> int:
        """Query rows of a tile."""
        return self.columns(is_wide) // self.group

    def splits_per_part(self, num_splits: int, num_tiles: int) -> int:
        """Of prompts: all, but where tiles are too few to fill a GPU, so that one reads a long context alone."""
        if self.fixed:
            return num_splits
        parts = -(-ENOUGH_PROGRAMS // (num_tiles * self.num_kv_heads))
        return -(-num_splits // parts)


@dataclass(frozen=True)
class Launch:
    """Tiles that are cut alike."""

    parcel: Parcel  # tiles and rows
    num_parts: int  # of a row, room for
    splits_per_part: int
    is_wide: bool

    @property
    def tiles(self) -> Tensor:
        """[num_tiles, 6] int32: sequence, query row, row of the parts, position, rows, window."""
        return self.parcel.tensors[0]

    @property
    def rows(self) -> Tensor:
        """[num_rows, 2] int32: query row, parts in use."""
        return self.parcel.tensors[1]


def launches(inputs: AttentionInputs, tiling: Tiling, windows: tuple[int, ...], device: torch.device) -> list[Launch]:
    """A decode step's rows have a part for each split, so that many programs share a context; rows of prompts, which
    are many programs already, have one part, or a few. Made for the first layer of a step and kept in
    `inputs.prepared`."""
    key = ("triton", tiling, windows)
    made: list[Launch] | None = inputs.prepared.get(key)
    if made is None:
        counts = [stop - start for start, stop in zip(inputs.query_starts, inputs.query_starts[1:], strict=False)]
        most = tiling.rows(False)
        decoding = [i for i, count in enumerate(counts) if 0 < count <= most]
        prompts = [i for i, count in enumerate(counts) if count > most]
        made = inputs.prepared[key] = [
            _launch(inputs, tiling, windows, chosen, device) for chosen in (decoding, prompts) if chosen
        ]
    return made


def _launch(
    inputs: AttentionInputs, tiling: Tiling, windows: tuple[int, ...], chosen: list[int], device: torch.device
) -> Launch:
    tiles: list[tuple[int, ...]] = []
    at: list[tuple[int, int]] = []  # query row, position
    is_prompt = inputs.query_starts[chosen[0] + 1] - inputs.query_starts[chosen[0]] > tiling.rows(False)
    is_wide, splits_per_part = is_prompt and not tiling.fixed, 1
    tile_rows = tiling.rows(is_wide)
    for i in chosen:
        start, stop = inputs.query_starts[i], inputs.query_starts[i + 1]
        first = inputs.context_lens[i] - (stop - start)  # position of the sequence's first row
        for row in range(start, stop, tile_rows):
            num_rows = min(tile_rows, stop - row)
            tiles.append((i, row, len(at), first + row - start, num_rows, min(windows[i], LONGEST)))
            at += [(row + j, first + row + j - start) for j in range(num_rows)]
    if is_prompt:
        num_splits = max(inputs.context_lens[i] - 1 for i in chosen) // tiling.split + 1
        splits_per_part = tiling.splits_per_part(num_splits, len(tiles))
    rows = [(row, position // (tiling.split * splits_per_part) + 1) for row, position in at]
    return Launch(
        send([torch.tensor(tiles, dtype=torch.int32), torch.tensor(rows, dtype=torch.int32)], device),
        max(used for _, used in rows),
        splits_per_part,
        is_wide,
    )


def refill(held: AttentionInputs, step: AttentionInputs) -> None:
    """Put a step's tiles where the recorded kernels of `held` read theirs. Both have the same number of sequences, one
    row each; contexts of `step` are no longer than those that `held` was prepared with. Mutates held.prepared."""
    host = torch.device("cpu")
    for (_, tiling, windows), made in held.prepared.items():
        for target, source in zip(made, launches(step, tiling, windows, host), strict=True):
            transfer.refill(target.parcel, source.parcel.tensors)
