"""The curriculum: which documents a training row holds, and how far apart their facts and questions are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from demo import recall, skills
from demo.books import Books
from demo.stories import sentences, story
from demo.text import CLOSE, END, GIVEN, NOISE, PLAIN, Doc, ask, turn

SENTENCE_TOKENS = 14  # about one filler sentence
FACT_TOKENS = 28  # about one fact with its question


@dataclass(frozen=True)
class Stage:
    """A part of the run: up to this share of it, rows of this many tokens, this many tokens a step."""

    until: float
    row: int
    step_tokens: int
    recall: float  # share of rows that hold one long recall document
    prose: float  # of the other documents, the share that is stories or books
    drill: bool = False  # the short tasks in the shares of DRILL
    long_every: int = 0  # every so many steps are LONG instead, so that distance stays


FIRST = 50 / 60.5  # share of the run in which rows grow; the drill follows
STAGES = (
    Stage(0.06 * FIRST, 128, 4096, 0.60, 0.20),
    Stage(0.20 * FIRST, 256, 4096, 0.60, 0.35),
    Stage(0.36 * FIRST, 512, 4096, 0.60, 0.50),
    Stage(0.47 * FIRST, 1024, 8192, 0.60, 0.50),
    Stage(0.61 * FIRST, 2048, 8192, 0.65, 0.50),
    Stage(0.75 * FIRST, 4096, 8192, 0.75, 0.50),
    Stage(FIRST, 4096, 8192, 0.60, 0.25),
    Stage(0.93, 512, 4096, 0.15, 0.12, drill=True, long_every=12),
    Stage(1.01, 512, 4096, 0.15, 0.12, drill=True, long_every=4),
)
LONG = Stage(1.01, 4096, 8192, 0.85, 0.25, drill=True)
MIXED = (4, 1, 2, 2, 2, 1, 3)  # shares of skills.TASKS, in their order
DRILL = (9, 1, 1, 1, 3, 3, 5)
ECHO_ROW = 512  # rows up to this long are at times random tokens, repeated


def stage_at(progress: float, step: int) -> Stage:
    """The stage for a share of the run in [0, 1] and the number of a step."""
    stage = next(stage for stage in STAGES if progress < stage.until)
    return LONG if stage.long_every and step % stage.long_every == 0 else stage


class Mixture:
    """Draws rows of (ids, weights), seeded."""

    def __init__(self, tokenizer: Tokenizer, books: Books, seed: int, workers: int = 1) -> None:
        self.workers = workers  # processes that share a step
        self.tokenizer = tokenizer
        self.books = books
        self.rng = random.Random(seed)
        self.end = tokenizer.encode(END, add_special_tokens=False).ids[0]

    def encode(self, doc: Doc) -> tuple[list[int], NDArray[np.float32]]:
        """Token ids of a document and the loss weight of each: that of the piece its last character lies in."""
        encoding = self.tokenizer.encode(doc.text, add_special_tokens=False)
        ends = np.cumsum([len(text) for text, _ in doc.pieces])
        weights = np.array([weight for _, weight in doc.pieces], dtype=np.float32)
        last = np.array([end - 1 for _, end in encoding.offsets])
        return encoding.ids, weights[np.searchsorted(ends, last, side="right")]

    def filler(self, count: int) -> list[str]:
        """About that many sentences, from stories or from a book."""
        found: list[str] = []
        bookish = self.rng.random() < 0.35 and bool(self.books.train)
        while len(found) < count:
            if bookish:
                found += self.books.passage(self.rng, "train", 2000).replace("\n\n", " ").split(". ")
            else:
                found += sentences(self.rng, "train")
        if bookish:
            found = [sentence.strip() + "." for sentence in found[: max(1, count // 2)]]
        return found[:count]

    def recall_doc(self, tokens: int) -> Doc:
        """A recall document of about that many tokens."""
        rng = self.rng
        kind = rng.random()
        count = rng.randint(2, max(3, min(72, tokens // rng.choice([32, 40, 60]))))
        if kind < 0.12:
            count = min(count, 6)
        lines = self.filler(max(0, int((tokens - FACT_TOKENS * count) / SENTENCE_TOKENS)))
        if kind < 0.12:
            return recall.chains(rng, "train", lines, count)
        if kind < 0.50:
            return recall.interview(rng, "train", lines, count)
        return recall.interleaved(rng, "train", lines, count)

    def skill_doc(self, drill: bool = False) -> Doc:
        """A chat of several short tasks, or one with tools or a system prompt."""
        rng = self.rng
        kind = rng.random()
        doc = Doc()
        if kind < 0.25:
            system, example = (skills.tool_call if kind < 0.13 else skills.obedience)(rng, "train")
            return ask(doc.add(turn("system", system), GIVEN), example.prompt, example.answer)
        names, shares = list(skills.TASKS), DRILL if drill else MIXED
        repeated = rng.random() < 0.5
        one = (rng.choices(names, DRILL)[0] if drill else rng.choice(names)) if repeated else ""
        for _ in range(rng.randint(1, 6)):
            name = one or rng.choices(names, shares)[0]
            example = skills.TASKS[name](rng, "train")
            ask(doc, example.prompt, example.answer)
        return doc

    def prose(self) -> Doc:
        """A story, a story in answer to a request, or a passage from a book."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.45 and self.books.train:
            return Doc().add(self.books.passage(rng, "train", 1200))
        if kind < 0.55:
            head = turn("user", rng.choice(["Tell me a story.", "Please tell me a story.", "Write a short story."]))
            return (
                Doc()
                .add(head + "<|im_start|>assistant\n", GIVEN)
                .add(story(rng, "train").strip() + CLOSE + "\n", PLAIN)
            )
        return Doc().add(story(rng, "train"))

    def row(self, stage: Stage) -> tuple[list[int], NDArray[np.float32]]:
        """stage.row + 1 ids and weights: whole documents one after the other, the last one cut."""
        ids: list[int] = []
        weights: list[NDArray[np.float32]] = []
        size = stage.row + 1
        long = self.rng.random() < stage.recall
        while len(ids) < size:
            if long:
                full = self.rng.random() < 0.7
                target = stage.row if full else int(128 * (stage.row / 128) ** self.rng.random())
                doc = self.recall_doc(int(0.9 * target))
                long = not full
            else:
                doc = self.prose() if self.rng.random() < stage.prose else self.skill_doc(stage.drill)
            new, weight = self.encode(doc)
            ids += [*new, self.end]
            weights += [weight, np.ones(1, dtype=np.float32)]
        return ids[:size], np.concatenate(weights)[:size]

    def echo(self, size: int) -> tuple[list[int], NDArray[np.float32]]:
        """Random tokens in runs that recur: pure practice of continuing what was seen before."""
        rng, ids = self.rng, list[int]()
        weights: list[float] = []
        while len(ids) < size:
            run = [rng.randrange(3, self.tokenizer.get_vocab_size()) for _ in range(rng.randint(6, 30))]
            ids += run + run
            weights += [NOISE] * (len(run) + 1) + [PLAIN] * (len(run) - 1)
        return ids[:size], np.array(weights[:size], dtype=np.float32)

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """(ids, weights), each [rows, stage.row + 1]."""
        echoes = 0.15 if stage.row <= ECHO_ROW else 0.0
        rows = [
            self.echo(stage.row + 1) if self.rng.random() < echoes else self.row(stage)
            for _ in range(max(1, stage.step_tokens // stage.row // self.workers))
        ]
        ids = torch.tensor([row[0] for row in rows], dtype=torch.long)
        return ids, torch.from_numpy(np.stack([row[1] for row in rows]))

    def examples(self, count: int) -> Iterator[Doc]:
        """Documents as they appear in training, to look at."""
        for _ in range(count):
            yield self.recall_doc(300) if self.rng.random() < 0.5 else self.skill_doc()
