"""Recall questions at an exact distance in tokens, and their teacher-forced scoring."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo.books import Books
from demo.recall import Fact, facts
from demo.stories import sentences
from demo.text import Split

Logits = Callable[[Tensor], Tensor]  # ids [batch, seq] -> logits [batch, seq, vocab]


@dataclass(frozen=True)
class Case:
    """Token ids of a prompt and of the only right answer."""

    prompt: list[int]
    answer: list[int]


def fill(rng: random.Random, tokenizer: Tokenizer, books: Books, distractors: list[Fact], tokens: int) -> list[int]:
    """Exactly that many tokens of held-out stories and book text with the distractors spread among them."""
    ids: list[int] = []
    every = max(1, tokens // (len(distractors) + 1))
    pending = list(distractors)
    while len(ids) < tokens:
        if rng.random() < 0.3 and books.held_out:
            lines = books.passage(rng, "held_out", 400).replace("\n\n", " ").split(". ")
            lines = [line.strip(" .") + "." for line in lines]
        else:
            lines = sentences(rng, "held_out")
        for line in lines:
            ids += tokenizer.encode(" " + line, add_special_tokens=False).ids
            if pending and len(ids) > every * (len(distractors) - len(pending) + 1):
                ids += tokenizer.encode(" " + pending.pop().statement, add_special_tokens=False).ids
    return ids[:tokens]


def recall_case(rng: random.Random, tokenizer: Tokenizer, books: Books, distance: int, split: Split) -> Case:
    """A fact, `distance` tokens of filler with other facts, then the question; a short preamble comes first."""
    known = facts(rng, split, 4 + distance // 64)
    while not known[0].value.isdigit():
        rng.shuffle(known)
    target, others = known[0], known[1:]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    ids: list[int] = encode(" ".join(fact.statement for fact in others[:2]))
    ids += encode(" " + target.statement)
    ids += fill(rng, tokenizer, books, others[2:], distance)
    ids += encode(f" {target.question} {target.stem}")
    return Case(ids, encode(f" {target.value}."))


def score(logits: Logits, cases: Sequence[Case], batch: int, window: int = 0) -> float:
    """Share of cases whose answer greedy decoding would give: every answer token is the argmax.

    A `window` above zero keeps only that many last tokens of every prompt. Cases are padded on the right.
    """
    right = 0
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        rows = [(case.prompt[-window:] if window else case.prompt) + case.answer for case in part]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        best = logits(ids).argmax(-1)  # [batch, seq]
        for index, (row, case) in enumerate(zip(rows, part, strict=True)):
            first = len(row) - len(case.answer)
            right += best[index, first - 1 : len(row) - 1].tolist() == case.answer
    return right / len(cases)
