"""Biases, penalties and bans of a step's draws, where its logits are. Nothing waits for the device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.contract import Edits, Last
from kernels.transfer import send

NO_LAST = Last(-1, 1.0, 0.0, 0.0)


def edited_rows(logits: Tensor, rows: Sequence[int], edits: Sequence[Edits], before: Tensor | None) -> Tensor:
    """What each of the edits makes of its row.  logits: [num_rows, vocab] float32 -> [len(edits), vocab].

    before: ids that the step before drew, int32, among which `last` is. Each operation is torch's, which rounds as on
    the CPU. A row is copied, 8 bytes an id; 32 bytes are sent for each id that is edited, 28 for each row.
    """
    owners = torch.arange(len(edits)).repeat_interleave(torch.tensor([len(edit.ids) for edit in edits]))
    lasts = [edit.last or NO_LAST for edit in edits]
    numbers = [
        torch.tensor(rows),
        owners,  # [num_ids] of each id, the place of its edits
        torch.cat([edit.ids for edit in edits]),
        torch.cat([edit.terms for edit in edits], 1),  # [3, num_ids]
        torch.cat([edit.counts for edit in edits]),
        torch.tensor([last.place for last in lasts]),
        torch.tensor([[last.factor, last.presence, last.frequency] for last in lasts]).T,  # [3, len(edits)]
    ]
    at, owners, ids, terms, counts, places, rules = send(numbers, logits.device).tensors
    copies = logits.index_select(0, at)
    if before is None or all(edit.last is None for edit in edits):
        _edit(copies, owners, ids, terms)
        return copies
    last = torch.where(places < 0, -1, before.index_select(0, places.clamp(min=0)).long())  # [len(edits)]
    is_last = last.index_select(0, owners) == ids
    again = _edited_again(terms, rules.index_select(1, owners), counts + 1)
    _edit(copies, owners, ids, torch.where(is_last, again, terms))
    # What is left are tokens that no edit names. Those that one does, and -1, are edited by nothing here.
    is_new = (last >= 0) & (torch.zeros_like(last).index_add_(0, owners, is_last.long()) == 0)
    nothing = torch.zeros_like(rules)
    nothing[1] = 1
    once = _edited_again(nothing, rules, torch.ones_like(rules[0]))
    every = torch.arange(len(edits), device=logits.device)
    _edit(copies, every, last.clamp(min=0), torch.where(is_new, once, nothing))
    return copies


def _edit(copies: Tensor, rows: Tensor, ids: Tensor, terms: Tensor) -> None:
    """copies: [num_rows, vocab], mutated; rows, ids: [n], no pair of them twice; terms: [3, n]."""
    flat, at = copies.view(-1), rows * copies.shape[1] + ids
    flat.scatter_(0, at, Edits(ids, terms, terms[0]).of(flat.index_select(0, at)))


def _edited_again(terms: Tensor, rules: Tensor, counts: Tensor) -> Tensor:
    """terms: [3, n] as they are -> as they are with the last token, which is in the answer `counts` times then."""
    factor, presence, frequency = rules.unbind()
    less = torch.where(terms[2] < math.inf, presence + frequency * counts, terms[2])
    return torch.stack((terms[0], factor, less))
