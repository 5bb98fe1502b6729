"""How one step's rows are cut into tiles and parts for the attention kernels (kernels/gpu/attention.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import transfer
from kernels.contract import AttentionInputs
from kernels.transfer import Parcel, send

MIN_COLUMNS = 16  # of a tile
# Columns of a prompt's tile: 128 take up to a fifth fewer instructions, and all registers for one program.
WIDE_COLUMNS = 64
MULTIPROCESSORS = 132  # of an H200
SPARE = 2  # parts that a row has room for, of those that it would have if all contexts were equally long
LONGEST = 1 << 30  # tokens; stands for any longer window


@dataclass(frozen=True)
class Tiling:
    """The constants of one kernel on one layer. Nothing depends on a batch if it is `fixed`: tiles of prompts are those
    of decode steps, and parts are splits."""

    group: int  # G: query heads that share a kv head
    split: int  # positions; a multiple of every page size
    num_kv_heads: int = 1
    fixed: bool = False
    least: int = MIN_COLUMNS  # columns of a decode step's tile
    residents: int = 3  # programs of a decode step that one multiprocessor surely runs at once: one more than it can
    # would wait for all others to end

    def columns(self, is_wide: bool) -> int:
        return max(WIDE_COLUMNS if is_wide else self.least, 1 << (self.group - 1).bit_length())

    def rows(self, is_wide: bool) -> int:
        """Query rows of a tile."""
        return self.columns(is_wide) // self.group

    def parts_of_prompts(self, num_splits: int, num_tiles: int) -> tuple[int, int]:
        """Splits of a part, and parts: one, but where tiles are too few to fill a GPU."""
        if self.fixed:
            return num_splits, 1
        wanted = -(-2 * MULTIPROCESSORS // (num_tiles * self.num_kv_heads))
        each = -(-num_splits // wanted)
        return each, -(-num_splits // each)

    def parts_of_decodes(self, splits: Sequence[int]) -> tuple[int, int]:
        """Splits of a part at least, and parts that a row has room for. splits: of each tile's context.

        All parts but the last of a context are equally long, so that programs end together, and as many as a GPU runs
        at once, once or several times. Room depends on the number of tiles and the longest context alone: a recorded
        step has the room of its own.
        """
        if self.fixed:
            return 1, max(splits)
        at_once = max(1, MULTIPROCESSORS * self.residents // self.num_kv_heads)
        parts = -(-4 * len(splits) // at_once) * at_once
        return -(-sum(splits) // (parts - len(splits))), min(max(splits), SPARE * parts // len(splits))


@dataclass(frozen=True)
class Launch:
    """Tiles that are cut alike."""

    parcel: Parcel  # tiles and rows
    num_parts: int  # of a row, room for
    is_wide: bool

    @property
    def tiles(self) -> Tensor:
        """[num_tiles, 7] int32: sequence, query row, row of the parts, position, rows, window, splits of a part."""
        return self.parcel.tensors[0]

    @property
    def rows(self) -> Tensor:
        """[num_rows, 2] int32: query row, parts in use."""
        return self.parcel.tensors[1]


def launches(inputs: AttentionInputs, tiling: Tiling, windows: tuple[int, ...], device: torch.device) -> list[Launch]:
    """A decode step's rows have many parts, so that many programs share a context; rows of prompts, which are many
    programs already, have one, or a few. Made for the first layer of a step and kept in `inputs.prepared`."""
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
    is_prompt = inputs.query_starts[chosen[0] + 1] - inputs.query_starts[chosen[0]] > tiling.rows(False)
    is_wide = is_prompt and not tiling.fixed
    tile_rows = tiling.rows(is_wide)
    cut: list[tuple[int, ...]] = []  # sequence, query row, position, rows
    for i in chosen:
        start, stop = inputs.query_starts[i], inputs.query_starts[i + 1]
        before = inputs.context_lens[i] - stop  # of a query row to its position
        cut += [(i, row, before + row, min(tile_rows, stop - row)) for row in range(start, stop, tile_rows)]
    splits = [(at + count - 1) // tiling.split + 1 for _, _, at, count in cut]
    if is_prompt:
        least, room = tiling.parts_of_prompts(max(splits), len(cut))
    else:
        least, room = tiling.parts_of_decodes(splits)
    tiles: list[tuple[int, ...]] = []
    rows: list[tuple[int, int]] = []
    for (i, row, at, count), num_splits in zip(cut, splits, strict=True):
        each = max(least, -(-num_splits // room))
        tiles.append((i, row, len(rows), at, count, min(windows[i], LONGEST), each))
        rows += [(row + j, (at + j) // (tiling.split * each) + 1) for j in range(count)]
    tables = [torch.tensor(tiles, dtype=torch.int32), torch.tensor(rows, dtype=torch.int32)]
    return Launch(send(tables, device), room, is_wide)


def refill(held: AttentionInputs, step: AttentionInputs) -> None:
    """Put a step's tiles where the recorded kernels of `held` read theirs. Both have the same number of sequences, one
    row each; contexts of `step` are no longer than those that `held` was prepared with. Mutates held.prepared."""
    host = torch.device("cpu")
    for (_, tiling, windows), made in held.prepared.items():
        for target, source in zip(made, launches(step, tiling, windows, host), strict=True):
            transfer.refill(target.parcel, source.parcel.tensors)
