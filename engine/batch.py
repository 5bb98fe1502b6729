"""What one forward pass reads, and how it is made from ids and counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, repeat

import torch
from torch import Tensor

from kernels.attention.quantized.layout import RECENT_TOKENS
from kernels.contract import AttentionInputs, RecentInputs
from kernels.transfer import send


@dataclass(frozen=True)
class BatchRow:
    """One sequence's part of a step: `token_ids` stand at positions start, start + 1, ..."""

    token_ids: list[int]  # at least one
    start: int
    block_table: list[int]  # page ids; covers start + len(token_ids) tokens, may be longer
    page_size: int  # tokens
    num_logits: int  # how many of the last rows need logits: 0 while a prompt is unfinished, usually 1
    recent_table: Mapping[int, int] = field(default_factory=dict)  # position // RECENT_TOKENS -> recent page id
    window: int | None = None  # tokens that the rows read in high precision; None: what the cache's policy says
    place: int | None = None  # of the one token among the ids of the step before; None: token_ids are known


@dataclass(frozen=True)
class After:
    """Ids that the step before draws: on the device, if they are computed yet, and nowhere else."""

    ids: Tensor  # [num_draws] int32, below 0 where none was drawn: such a row is computed for nothing
    places: Tensor  # [num_tokens] int64, the id that each row of the step reads; -1 for rows whose ids are known

    def read(self, known: Tensor) -> Tensor:
        """known: [num_tokens] int64 -> the same with all ids, on the device of `ids`."""
        drawn = self.ids.index_select(0, self.places.clamp(min=0)).clamp(min=0)
        return torch.where(self.places < 0, known, drawn)


@dataclass(frozen=True)
class Batch:
    """The rows of one step: chunks of prompts and single decode tokens of several sequences, one after the other."""

    input_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    attention: AttentionInputs
    logit_rows: Tensor  # [num_logits] int64, the rows whose next-token logits are wanted
    after: After | None = None  # where ids that are not known are; None: all are

    @property
    def tensors(self) -> list[Tensor]:
        """All that the host made."""
        attention, recent = self.attention, self.attention.recent
        made = [self.input_ids, self.positions, attention.block_tables, attention.slots, self.logit_rows]
        return [
            *made,
            *([] if recent is None else [recent.tables, recent.slots]),
            *([] if self.after is None else [self.after.places]),
        ]

    def on(self, tensors: Sequence[Tensor]) -> "Batch":
        """The same with copies of `self.tensors` in their places."""
        input_ids, positions, tables, slots, logit_rows, *others = tensors
        recent, after = self.attention.recent, self.after
        if recent is not None:
            recent = replace(recent, tables=others[0], slots=others[1])
        if after is not None:
            after = replace(after, places=others[-1])
        attention = replace(self.attention, block_tables=tables, slots=slots, recent=recent)
        return Batch(input_ids, positions, attention, logit_rows, after)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`, its ids in their place; itself when it is there already. A
        GPU is not waited for."""
        is_there = self.input_ids.device == device
        batch = self if is_there else self.on(send(self.tensors, device).tensors)
        return batch if batch.after is None else replace(batch, input_ids=batch.after.read(batch.input_ids), after=None)


def build_batch(rows: Sequence[BatchRow], before: Tensor | None = None) -> Batch:
    """Lay the rows out one after the other, on the CPU; one tensor is made for each field. before: the ids of the step
    before, int32 on the device, where some of the rows have a place.

    The model's logits come in the same order: `rows[0].num_logits` of the first sequence, then the second's.
    """
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    for row in rows:
        stop = row.start + len(row.token_ids)
        input_ids += row.token_ids
        positions += range(row.start, stop)
        slots += _slots(row, stop)
        logit_rows += range(len(input_ids) - row.num_logits, len(input_ids))
    width = max(len(row.block_table) for row in rows)
    tables = [[*row.block_table, *repeat(0, width - len(row.block_table))] for row in rows]
    attention = AttentionInputs(
        query_starts=tuple(accumulate((len(row.token_ids) for row in rows), initial=0)),
        context_lens=tuple(row.start + len(row.token_ids) for row in rows),
        block_tables=torch.tensor(tables, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        recent=_recent(rows) if any(row.recent_table for row in rows) else None,
    )
    return Batch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        attention=attention,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        after=None if before is None else After(before, _places(rows)),
    )


def _places(rows: Sequence[BatchRow]) -> Tensor:
    places: list[int] = []
    for row in rows:
        places += [-1 if row.place is None else row.place] * len(row.token_ids)
    return torch.tensor(places, dtype=torch.int64)


def _slots(row: BatchRow, stop: int) -> list[int]:
    """Where each token of the row is stored: page id * page_size + offset in the page."""
    table, size = row.block_table, row.page_size
    return [table[position // size] * size + position % size for position in range(row.start, stop)]


def _recent(rows: Sequence[BatchRow]) -> RecentInputs:
    """Recent pages, by sequence and by row."""
    width = max(max(row.recent_table) for row in rows if row.recent_table) + 1
    at: list[int] = []  # one assignment for all: one for each of 64 rows takes 1 ms
    pages: list[int] = []
    slots: list[int] = []
    for i, row in enumerate(rows):
        held = row.recent_table
        at += [i * width + r for r in held]
        pages += held.values()
        for position in range(row.start, row.start + len(row.token_ids)):
            page = held.get(position // RECENT_TOKENS)
            slots.append(-1 if page is None else page * RECENT_TOKENS + position % RECENT_TOKENS)
    tables = torch.full((len(rows), width), -1, dtype=torch.int64)
    tables.view(-1)[torch.tensor(at, dtype=torch.int64)] = torch.tensor(pages, dtype=torch.int64)
    return RecentInputs(tables, torch.tensor(slots, dtype=torch.int64), tuple(row.window for row in rows))
