"""What generators produce: text with a training weight for every character, and exact-match examples."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Split = Literal["train", "held_out"]
T = TypeVar("T")

ANSWER = 6.0  # weight of a token that can be derived from the context
PLAIN = 1.0  # weight of ordinary prose
FILLER = 0.5  # weight of prose between facts
GIVEN = 0.2  # weight of a question or an instruction
NOISE = 0.0  # weight of random values at their first appearance, which nobody could predict

END = "<|endoftext|>"
OPEN = "<|im_start|>"
CLOSE = "<|im_end|>"


@dataclass
class Doc:
    """A training document: pieces of text, each with the loss weight of its tokens."""

    pieces: list[tuple[str, float]] = field(default_factory=list)

    def add(self, text: str, weight: float = PLAIN) -> Doc:
        """Append text; returns self so that calls chain."""
        self.pieces.append((text, weight))
        return self

    @property
    def text(self) -> str:
        """The whole document."""
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Example:
    """One exact-match question: `prompt + answer` is the text, `answer` is what is scored."""

    task: str
    prompt: str
    answer: str


def is_held_out(*key: object) -> bool:
    """Whether content belongs to the held-out split: a fixed hash of the content, one in twelve."""
    return zlib.crc32(repr(key).encode()) % 12 == 0


def draw(rng: random.Random, split: Split, sample: Callable[[random.Random], T]) -> T:
    """Sample until the content falls into the wanted split."""
    for _ in range(10_000):
        value = sample(rng)
        if is_held_out(value) == (split == "held_out"):
            return value
    raise ValueError(f"the sampler produced no {split} content in 10,000 tries")


def turn(role: str, content: str) -> str:
    """One ChatML message."""
    return f"{OPEN}{role}\n{content}{CLOSE}\n"


def ask(doc: Doc, question: str, answer: str) -> Doc:
    """Append a user turn and the assistant's answer, whose tokens carry the answer weight."""
    doc.add(turn("user", question), GIVEN).add(f"{OPEN}assistant\n", GIVEN)
    return doc.add(f"{answer}{CLOSE}", ANSWER).add("\n", GIVEN)


def chat_prompt(question: str, system: str = "") -> str:
    """The prompt that the chat template renders for one user message (and a system message)."""
    head = turn("system", system) if system else ""
    return f"{head}{turn('user', question)}{OPEN}assistant\n"
