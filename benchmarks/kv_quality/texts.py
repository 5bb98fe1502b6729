"""What the model is asked and read: held-out text, the same passage twice, and facts to be found again."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import recall
from demo.books import Books, paragraphs
from demo.cases import fill
from demo.recall import Fact
from demo.stories import sentences, story
from demo.text import ANSWER

CHAPTER = Path(__file__).parents[2] / "demo" / "heldout_chapter.txt"
PAGE = 64  # tokens; a text of questions ends where a page ends, so that all of it is found again
COPY_SHARE = 0.3  # of a text, at its beginning and again at its end
GRAIN = 64  # tokens for each fact

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Sizes:
    """How much is read and asked."""

    length: int  # tokens of a text
    num_texts: int  # of each kind
    num_contexts: int  # texts with many facts
    num_questions: int  # about each
    num_passkeys: int  # texts with one fact, at each distance
    distances: tuple[int, ...]  # of those
    context: int  # tokens of a text with many facts
    calibration: int  # tokens


@dataclass(frozen=True)
class Text:
    """Token ids, and the positions of those whose loss counts, under the name of what they show."""

    ids: list[int]
    counted: dict[str, list[int]]


@dataclass(frozen=True)
class Question:
    """A fact to find, and how far back its statement ends."""

    prompt: list[int]
    answer: list[int]
    distance: int  # tokens


def encoder(model: Path) -> tuple[Any, Encode]:
    """The checkpoint's tokenizer, and what it makes of a piece of text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return tokenizer, encode


def held_out(encode: Encode, sizes: Sizes, first: int) -> list[Text]:
    """Texts of `length` tokens: a chapter of a book, stories, facts with questions whose answers count by themselves
    too, and a passage that comes twice, of which the second time counts. No position before `first` does."""
    rng, length = random.Random(3), sizes.length
    beyond = list(range(first, length))
    chapter = encode("\n\n".join(paragraphs(CHAPTER.read_text("utf-8"))))
    made = []
    for i in range(sizes.num_texts):
        made.append(Text(chapter[i * length : (i + 1) * length], {"chapter": beyond}))
        made.append(Text(_stories(rng, encode, length), {"stories": beyond}))
        ids, answers = _facts(rng, encode, length)
        made.append(Text(ids, {"facts": beyond, "answers": [at for at in answers if at >= first]}))
    repeated = int(length * COPY_SHARE)
    for passage in (chapter[-repeated:], _stories(rng, encode, repeated)):
        ids = passage + _stories(rng, encode, length - 2 * repeated) + passage
        made.append(Text(ids, {"copy": list(range(length - repeated, length))}))
    return made


def calibration_text(num_characters: int) -> str:
    """Stories and facts of the training split; no book."""
    rng, parts = random.Random(5), [""]
    while sum(map(len, parts)) < num_characters:
        filler = [line for _ in range(4) for line in sentences(rng, "train")]
        parts += [story(rng, "train"), recall.interleaved(rng, "train", filler, 8).text]
    return "\n\n".join(parts[1:])


def _stories(rng: random.Random, encode: Encode, length: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < length:
        ids += encode(story(rng, "held_out") + "\n\n")
    return ids[:length]


def _facts(rng: random.Random, encode: Encode, length: int) -> tuple[list[int], list[int]]:
    """Token ids, and the positions of answers, which the text has given away before."""
    ids: list[int] = []
    answers: list[int] = []
    while len(ids) < length:
        filler = [line for _ in range(length // 150 + 1) for line in sentences(rng, "held_out")]
        for piece, weight in recall.interleaved(rng, "held_out", filler, max(2, length // 75)).pieces:
            tokens = encode(piece)
            if weight == ANSWER:
                answers += range(len(ids), len(ids) + len(tokens))
            ids += tokens
    return ids[:length], [at for at in answers if at < length]


class Tokens:
    """What demo.cases asks of a tokenizer."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    @dataclass(frozen=True)
    class Encoded:
        ids: list[int]

    def encode(self, text: str, add_special_tokens: bool = False) -> "Tokens.Encoded":
        return Tokens.Encoded(self._encode(text))


def multi_key(encode: Encode, sizes: Sizes) -> list[list[Question]]:
    """For each text: questions about facts that stand in it every GRAIN tokens, all of one form."""
    return [_many(random.Random(100 + i), encode, sizes) for i in range(sizes.num_contexts)]


def _many(rng: random.Random, encode: Encode, sizes: Sizes) -> list[Question]:
    length = sizes.context - sizes.context % PAGE
    known = recall.facts(rng, "held_out", length // GRAIN - 2)
    ids: list[int] = []
    ends: list[int] = []
    for number, fact in enumerate(known):
        ids += encode((" " if ids else "") + fact.statement)
        ends.append(len(ids))
        ids += _filler(rng, encode, (number + 1) * (length - GRAIN) // len(known) - len(ids))
    ids += _filler(rng, encode, length - len(ids))
    asked = rng.sample(range(len(known)), min(sizes.num_questions, len(known)))
    return [_question(encode, ids, known[i], length - ends[i]) for i in asked]


def passkeys(encode: Encode, sizes: Sizes) -> list[Question]:
    """One fact, then `distance` tokens of stories and book without another."""
    made = []
    for distance in sizes.distances:
        for number in range(sizes.num_passkeys):
            rng = random.Random(1000 * distance + number)
            fact = recall.facts(rng, "held_out", 1)[0]
            ids = _filler(rng, encode, 48) + encode(" " + fact.statement) + _filler(rng, encode, distance)
            made.append(_question(encode, ids, fact, distance))
    return made


def _filler(rng: random.Random, encode: Encode, length: int) -> list[int]:
    if length <= 0:
        return []
    tokenizer: Any = Tokens(encode)
    return fill(rng, tokenizer, _books(), [], length)


def _books() -> Books:
    return Books([], paragraphs(CHAPTER.read_text("utf-8")))


def _question(encode: Encode, ids: list[int], fact: Fact, distance: int) -> Question:
    return Question(ids + encode(f" {fact.question} {fact.stem}"), encode(f" {fact.value}."), distance)
