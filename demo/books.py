"""Public-domain books, read from a folder of plain text files; the last tenth of each is held out."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from demo.text import Split

WANTED = re.compile(r"alice|sherlock|pride|peace", re.IGNORECASE)


@dataclass(frozen=True)
class Books:
    """Paragraphs of the books, in reading order, by split."""

    train: list[str]
    held_out: list[str]

    def passage(self, rng: random.Random, split: Split, characters: int) -> str:
        """Consecutive paragraphs of about that many characters, or "" without books."""
        pool = self.train if split == "train" else self.held_out
        if not pool:
            return ""
        start = rng.randrange(len(pool))
        taken: list[str] = []
        size = 0
        while size < characters and start < len(pool):
            taken.append(pool[start])
            size += len(pool[start]) + 2
            start += 1
        return "\n\n".join(taken)


def paragraphs(text: str) -> list[str]:
    """The body of a book between its licence markers as unwrapped paragraphs in plain ASCII punctuation."""
    text = text.replace("\r\n", "\n")
    start, end = text.find("*** START"), text.find("*** END")
    if start >= 0:
        text = text[text.index("\n", start) : end if end > 0 else None]
    for fancy, plain in (
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2018", "'"),
        ("\u2019", "'"),
        ("\u2014", "--"),
        ("_", ""),
    ):
        text = text.replace(fancy, plain)
    joined = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in joined if len(block) > 40]


def load(folder: Path | None) -> Books:
    """Read every wanted *.txt of the folder; no folder gives no books."""
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(folder.glob("*.txt")) if folder else []:
        if WANTED.search(path.name):
            blocks = paragraphs(path.read_text(encoding="utf-8"))
            cut = len(blocks) * 9 // 10
            train += blocks[:cut]
            held_out += blocks[cut:]
    return Books(train, held_out)
