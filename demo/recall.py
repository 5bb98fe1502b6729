"""Facts stated once and asked for later: the tasks that need memory over distance."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from demo.text import ANSWER, CLOSE, FILLER, GIVEN, NOISE, OPEN, PLAIN, Doc, Split, draw
from demo.words import ATTRIBUTES, CITIES, COLOURS, NAMES

FACT = re.compile(r"The (\w+) of (\w+) is (\w+)\.")


@dataclass(frozen=True)
class Fact:
    """One statement, `The <attribute> of <name> is <value>.`"""

    attribute: str
    name: str
    value: str

    @property
    def stem(self) -> str:
        """The statement up to its value."""
        return f"The {self.attribute} of {self.name} is"

    @property
    def statement(self) -> str:
        """The full statement."""
        return f"{self.stem} {self.value}."

    @property
    def question(self) -> str:
        """The question whose answer is the statement."""
        return f"What is the {self.attribute} of {self.name}?"


def digits(rng: random.Random) -> str:
    """A random value of four digits."""
    return f"{rng.randrange(10_000):04d}"


def facts(rng: random.Random, split: Split, count: int) -> list[Fact]:
    """Facts with distinct (attribute, name); values are four digits, or at times a city or a colour."""
    made: dict[tuple[str, str], Fact] = {}
    names = rng.sample(NAMES, min(len(NAMES), max(2, count * 2 // 3)))
    while len(made) < count:
        name = rng.choice(names)
        kind = rng.random()
        if kind < 0.8 or split == "held_out":
            fact = Fact(rng.choice(ATTRIBUTES), name, draw(rng, split, digits))
        elif kind < 0.9:
            fact = Fact("city", name, rng.choice(CITIES))
        else:
            fact = Fact("colour", name, rng.choice(COLOURS))
        made.setdefault((fact.attribute, fact.name), fact)
    return list(made.values())


def state(doc: Doc, fact: Fact, end: str = " ") -> None:
    """Write a fact; its value cannot be predicted and carries no weight."""
    doc.add(fact.stem, GIVEN).add(f" {fact.value}", NOISE).add(f".{end}", PLAIN)


def answer(doc: Doc, fact: Fact, end: str = " ") -> None:
    """Write question and answer inline."""
    doc.add(f"{fact.question} {fact.stem}", GIVEN).add(f" {fact.value}.", ANSWER).add(end, GIVEN)


def interleaved(rng: random.Random, split: Split, filler: list[str], count: int) -> Doc:
    """Sentences of filler with facts and questions about earlier facts in between, at log-uniform distances."""
    doc = Doc()
    slots = max(1, len(filler))
    events: list[tuple[float, int, Fact]] = []
    for fact in facts(rng, split, count):
        gap = min(slots * 0.98, slots ** rng.random())
        start = rng.random() * (slots - gap)
        events += [(start, 0, fact), (start + gap, 1, fact)]
    events.sort(key=lambda event: (event[0], event[1]))
    at = 0
    for index, sentence in enumerate(filler):
        while at < len(events) and events[at][0] <= index:
            (answer if events[at][1] else state)(doc, events[at][2])
            at += 1
        doc.add(sentence + " ", FILLER)
    for _, asked, fact in events[at:]:
        (answer if asked else state)(doc, fact)
    return doc.add("\n")


def interview(rng: random.Random, split: Split, filler: list[str], count: int) -> Doc:
    """A user message of filler and facts, then turns of questions about them in random order."""
    doc = Doc().add(f"{OPEN}user\n", GIVEN)
    known = facts(rng, split, count)
    places = sorted(rng.randrange(len(filler) + 1) for _ in known)
    at = 0
    for index in range(len(filler) + 1):
        while at < count and places[at] == index:
            state(doc, known[at])
            at += 1
        if index < len(filler):
            doc.add(filler[index] + " ", FILLER)
    rng.shuffle(known)
    for number, fact in enumerate(known[: max(1, count * 4 // 5)]):
        doc.add(f"{CLOSE}\n{OPEN}user\n{fact.question}" if number else f"\n{fact.question}", GIVEN)
        doc.add(f"{CLOSE}\n{OPEN}assistant\n", GIVEN).add(fact.stem, PLAIN)
        doc.add(f" {fact.value}.", ANSWER)
    return doc.add(f"{CLOSE}\n", PLAIN)


def chains(rng: random.Random, split: Split, filler: list[str], count: int) -> Doc:
    """Two hops: `The friend of A is B.` and `The city of B is C.`; the question names A and asks for C."""
    doc = Doc()

    def sample(r: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(r.sample(NAMES, 2 * count)), tuple(r.choice(CITIES) for _ in range(count))

    names, cities = draw(rng, split, sample)
    pairs = list(zip(names[:count], names[count:], strict=True))
    lines = [(Fact("friend", a, b), Fact("city", b, c)) for (a, b), c in zip(pairs, cities, strict=True)]
    first, second = [pair[0] for pair in lines], [pair[1] for pair in lines]
    rng.shuffle(first)
    rng.shuffle(second)
    for index, fact in enumerate(first + second):
        state(doc, fact)
        for sentence in filler[index * len(filler) // (2 * count) : (index + 1) * len(filler) // (2 * count)]:
            doc.add(sentence + " ", FILLER)
    rng.shuffle(lines)
    for friend, city in lines:
        doc.add(f"{hop_question(friend.name)} The friend of {friend.name} is", GIVEN)
        doc.add(f" {friend.value}. The city of {city.name} is {city.value}.", ANSWER).add(" ", GIVEN)
    return doc.add("\n")


def hop_question(name: str) -> str:
    """The two-hop question about a name."""
    return f"What is the city of the friend of {name}?"
