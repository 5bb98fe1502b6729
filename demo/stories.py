"""Short stories from a grammar: who, where and what they want stay the same from first to last line."""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo.text import Split, draw
from demo.words import ANIMALS, BOYS, COLOURS, GIRLS, PLACES, THINGS, listed

TRAITS = listed("little kind brave curious shy clever cheerful quiet lonely gentle")
WEATHER = (
    "The sun was shining and the sky was blue.",
    "It was raining, and the drops danced on the leaves.",
    "The wind was blowing and the clouds were big and grey.",
    "It was a warm day, and the birds were singing.",
    "Snow had fallen in the night, and everything was white.",
    "The morning was cool and the grass was wet.",
)
FEELINGS = ("very happy", "so proud", "full of joy", "glad and warm inside", "happier than ever before")
ENDINGS = (
    "From that day on, {a} and {b} were the best of friends.",
    "And {a} never forgot how {b} had helped {him}.",
    "That night, {a} fell asleep with a smile.",
    "{a} learned that it is good to ask for help.",
    "{a} learned that sharing makes everyone happy.",
    "And they lived happily in {home} for many years.",
)
OPENINGS = (
    "Once upon a time, there was {a_trait} {kind} named {a}.",
    "Once upon a time, in {home}, there lived {a_trait} {kind} named {a}.",
    "One day, {a_trait} {kind} named {a} went to {place}.",
    "There once was {a_trait} {kind} called {a}, who lived near {home}.",
    "Long ago, {a_trait} {kind} named {a} lived in {home}.",
)
HELLOS = (
    '"Hello, my name is {b}," said the {bkind}. "Why are you looking so sad?"',
    '"Good morning!" said a {bkind} named {b}. "What are you looking for?"',
    '"Who is there?" asked a {bkind}. It was {b}, an old friend.',
    '"Can I help you?" asked {b} the {bkind}.',
)


@dataclass(frozen=True)
class Cast:
    """The facts of one story."""

    hero: str
    girl: bool
    animal: str  # "" for a child
    friend: str
    friend_kind: str
    thing: str
    colour: str
    home: str
    place: str
    goal: str


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def cast(rng: random.Random) -> Cast:
    """Draw the facts of a story."""
    girl = rng.random() < 0.5
    hero = rng.choice(GIRLS if girl else BOYS)
    friend = rng.choice([name for name in GIRLS + BOYS if name != hero])
    home, place = rng.sample(PLACES, 2)
    return Cast(
        hero=hero,
        girl=girl,
        animal=rng.choice(ANIMALS) if rng.random() < 0.4 else "",
        friend=friend,
        friend_kind=rng.choice(ANIMALS),
        thing=rng.choice(THINGS),
        colour=rng.choice(COLOURS),
        home=home,
        place=place,
        goal=rng.choice(("lost", "wish", "gift", "make", "trip")),
    )


def opening(rng: random.Random, c: Cast) -> list[str]:
    """Who the hero is and what the day is like."""
    kind = c.animal or ("girl" if c.girl else "boy")
    first = rng.choice(OPENINGS).format(
        a=c.hero, a_trait=article(rng.choice(TRAITS)), kind=kind, home=c.home, place=c.place
    )
    lines = [first]
    he = "She" if c.girl else "He"
    lines += rng.sample(
        [
            f"{he} lived in a small house near {c.home}.",
            f"{c.hero} liked to play in {c.home} every day.",
            f"Everyone in {c.home} knew {c.hero}, because {he.lower()} was always kind.",
            rng.choice(WEATHER),
        ],
        rng.randint(1, 3),
    )
    return lines


def problem(rng: random.Random, c: Cast) -> list[str]:
    """What the hero wants."""
    he, his = ("she", "her") if c.girl else ("he", "his")
    thing = f"{c.colour} {c.thing}"
    options = {
        "lost": [
            f"{c.hero} had {article(thing)} that {he} loved very much.",
            f"But one day, {he} could not find {his} {thing}.",
            rng.choice(
                [
                    f"{c.hero} looked under the bed and behind the door, but the {thing} was not there.",
                    f'"Where is my {thing}?" cried {c.hero}.',
                ]
            ),
            f"So {he} went to {c.place} to look for it.",
        ],
        "wish": [
            f"More than anything, {c.hero} wished for {article(thing)}.",
            f'"If only I had {article(thing)}," {he} said.',
            f"Somebody told {his} mother that there was one in {c.place}, so {c.hero} set out to find it.",
        ],
        "gift": [
            f"It was the birthday of {c.friend} the {c.friend_kind}, and {c.hero} wanted to bring a gift.",
            f"{c.hero} took {article(thing)} and wrapped it in paper.",
            f"Then {he} walked to {c.place}, where {c.friend} was waiting.",
        ],
        "make": [
            f"One morning, {c.hero} decided to make {article(thing)}.",
            f"It was hard work, and the first {c.thing} fell apart.",
            f"{he.capitalize()} went to {c.place} to find what {he} needed.",
        ],
        "trip": [
            f"{c.hero} had never seen {c.place}, and {he} wanted to go there.",
            f"{he.capitalize()} packed some bread and {his} {thing} into a bag.",
            f"After a long walk, {he} came to {c.place}.",
        ],
    }
    return options[c.goal]


def meeting(rng: random.Random, c: Cast) -> list[str]:
    """The friend appears and helps."""
    he, his = ("she", "her") if c.girl else ("he", "his")
    hello = rng.choice(HELLOS).format(b=c.friend, bkind=c.friend_kind)
    thing = f"{c.colour} {c.thing}"
    answers = {
        "lost": [
            f'"I have lost my {thing}," said {c.hero}.',
            f'"Do not cry," said {c.friend}. "We will look for it together."',
            f"They looked everywhere in {c.place}. At last, {c.friend} saw something {c.colour} in the grass.",
            f'It was the {c.thing}! "Thank you, {c.friend}!" said {c.hero}.',
        ],
        "wish": [
            f'"I am looking for {article(thing)}," said {c.hero}.',
            f'"I have one at home," said {c.friend}. "You may have it, if you sing me a song."',
            f"So {c.hero} sang {his} best song, and {c.friend} gave {'her' if c.girl else 'him'} the {thing}.",
        ],
        "gift": [
            f'"I have something for you," said {c.hero}, and gave {c.friend} the paper bag.',
            f'{c.friend} opened it and found the {thing}. "It is just what I wanted!" said {c.friend}.',
            f"They ate cake and danced in {c.place} until the moon came up.",
        ],
        "make": [
            f'"I want to make {article(thing)}, but I do not know how," said {c.hero}.',
            f'"I can show you," said {c.friend}. "My father made many of them."',
            f"They worked all day in {c.place}. In the evening the {thing} was ready, and it was beautiful.",
        ],
        "trip": [
            f'"I want to see all of {c.place}," said {c.hero}.',
            f'"Then come with me," said {c.friend}, and they walked together.',
            f"{c.friend} was tired and cold, so {c.hero} gave {c.friend} {his} {thing}.",
            f'"You are a good friend, {c.hero}," said {c.friend}.',
        ],
    }
    return [f"In {c.place}, {he} met {article(c.friend_kind)}.", hello, *answers[c.goal]]


def ending(rng: random.Random, c: Cast) -> list[str]:
    """How the hero feels, and what remains."""
    he, him = ("She", "her") if c.girl else ("He", "him")
    last = rng.choice(ENDINGS).format(a=c.hero, b=c.friend, him=him, home=c.home)
    feel = f"{c.hero} was {rng.choice(FEELINGS)}."
    way = f"{he} went back to {c.home} and told everyone about {c.friend} the {c.friend_kind}."
    return rng.choice([[feel, last], [way, last], [feel, way, last]])


def paragraphs(rng: random.Random, split: Split) -> list[list[str]]:
    """A story as paragraphs of sentences."""
    c = draw(rng, split, cast)
    return [opening(rng, c) + problem(rng, c), meeting(rng, c), ending(rng, c)]


def sentences(rng: random.Random, split: Split) -> list[str]:
    """The sentences of a story, in order."""
    return [sentence for paragraph in paragraphs(rng, split) for sentence in paragraph]


def story(rng: random.Random, split: Split) -> str:
    """One story, its paragraphs separated by blank lines."""
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs(rng, split)) + "\n"
