"""Rows to tensors."""

import torch

from engine.batch import BatchRow, build_batch


def test_rows_are_laid_out_one_after_the_other() -> None:
    """A prompt's second chunk that crosses a page edge, a decoding sequence, and a prompt that wants every logit."""
    batch = build_batch(
        [
            BatchRow([11, 12, 13], 3, [9, 2], page_size=4, num_logits=0),
            BatchRow([14], 8, [5, 1, 7], page_size=4, num_logits=1),
            BatchRow([15, 16], 0, [3], page_size=4, num_logits=2),
        ]
    )
    assert batch.input_ids.tolist() == [11, 12, 13, 14, 15, 16]
    assert batch.positions.tolist() == [3, 4, 5, 8, 0, 1]
    assert batch.logit_rows.tolist() == [3, 4, 5]
    assert batch.attention.query_starts == (0, 3, 4, 6)
    assert batch.attention.context_lens == (6, 9, 2)
    assert batch.attention.block_tables.tolist() == [[9, 2, 0], [5, 1, 7], [3, 0, 0]]
    assert batch.attention.slots.tolist() == [9 * 4 + 3, 2 * 4, 2 * 4 + 1, 7 * 4, 3 * 4, 3 * 4 + 1]


def test_a_block_table_that_lives_on_is_copied() -> None:
    """Bug: the manager extends a list that the batch still refers to, or the batch pads the manager's list."""
    table = [4]
    build_batch([BatchRow([1], 0, table, 4, 1), BatchRow([1], 4, [1, 2], 4, 1)])
    assert table == [4]


def test_rows_are_kept_where_their_sequence_has_a_recent_page() -> None:
    """Bugs: a row kept in a page of another sixteen positions, or of the sequence beside it."""
    rows = [BatchRow([1] * 4, 30, [0], 64, 0, {0: 5, 1: 7, 2: 3}), BatchRow([1], 9, [1], 64, 1, {0: 2})]
    recent = build_batch([*rows, BatchRow([1, 2], 15, [2], 64, 1, {0: 4})]).attention.recent
    assert recent is not None
    assert recent.tables.tolist() == [[5, 7, 3], [2, -1, -1], [4, -1, -1]]
    assert recent.slots.tolist() == [7 * 16 + 14, 7 * 16 + 15, 3 * 16, 3 * 16 + 1, 2 * 16 + 9, 4 * 16 + 15, -1]
    assert build_batch([BatchRow([1], 0, [0], 64, 1)]).attention.recent is None


def test_a_step_may_want_no_logits() -> None:
    batch = build_batch([BatchRow([1, 2], 0, [0], 4, 0)])
    assert batch.logit_rows.shape == (0,)


def test_a_batch_moves_as_a_whole() -> None:
    """Bug: one field stays behind on the CPU and the first step on a GPU fails."""
    batch = build_batch([BatchRow([1, 2], 0, [0], 4, 1, {0: 1})])
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    tensors = [moved.input_ids, moved.positions, moved.logit_rows, moved.attention.block_tables, moved.attention.slots]
    assert moved.attention.recent is not None
    tensors += [moved.attention.recent.tables, moved.attention.recent.slots]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
