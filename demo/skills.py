"""Small skills with one right answer: copying, induction, arithmetic, sorting, counting, JSON, tools, obedience."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from demo.text import Example, Split, draw
from demo.words import ANIMALS, CITIES, COLOURS, FRUITS, JOBS, NAMES, NUMBER_WORDS, THINGS, WORDS

Task = Callable[[random.Random, Split], Example]


def pick(rng: random.Random, pool: list[str], low: int, high: int) -> tuple[str, ...]:
    """Between low and high words of the pool, repetitions allowed."""
    return tuple(rng.choice(pool) for _ in range(rng.randint(low, high)))


def copying(rng: random.Random, split: Split) -> Example:
    """Repeat a list of words or digits."""
    pool = rng.choice([WORDS, WORDS, list("0123456789"), NAMES])
    words = draw(rng, split, lambda r: pick(r, pool, 4, 24))
    line = " ".join(words)
    return Example("copying", f"Repeat: {line}", line)


def reversing(rng: random.Random, split: Split) -> Example:
    """Repeat a short list backwards."""
    words = draw(rng, split, lambda r: pick(r, WORDS, 2, 5))
    return Example("reversing", f"Reverse: {' '.join(words)}", " ".join(reversed(words)))


def addition(rng: random.Random, split: Split) -> Example:
    """a + b with a, b below 100."""
    a, b = draw(rng, split, lambda r: (r.randrange(100), r.randrange(100)))
    return Example("arithmetic", f"What is {a} + {b}?", f"{a} + {b} = {a + b}")


def subtraction(rng: random.Random, split: Split) -> Example:
    """a - b with 0 <= b <= a < 100."""
    a, b = draw(rng, split, lambda r: tuple(sorted((r.randrange(100), r.randrange(100)), reverse=True)))
    return Example("arithmetic", f"What is {a} - {b}?", f"{a} - {b} = {a - b}")


def sorting(rng: random.Random, split: Split) -> Example:
    """Sort distinct numbers below 100."""
    numbers = draw(rng, split, lambda r: tuple(r.sample(range(100), r.randint(3, 6))))
    return Example("sorting", f"Sort: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers))))


def counting(rng: random.Random, split: Split) -> Example:
    """How often a word occurs in a list of few distinct words."""
    words = draw(rng, split, lambda r: pick(r, r.sample(FRUITS, 3), 3, 10))
    target = rng.choice(words)
    count = words.count(target)
    return Example("counting", f"Count {target}: {' '.join(words)}", f"{target}: {NUMBER_WORDS[count]}")


FIELDS: dict[str, list[str]] = {
    "name": NAMES,
    "city": CITIES,
    "job": JOBS,
    "pet": ANIMALS,
    "colour": COLOURS,
    "item": THINGS,
    "fruit": FRUITS,
}


def json_object(rng: random.Random, split: Split) -> Example:
    """Values given as prose, a schema given as key names and types: answer with the JSON object."""
    keys = rng.sample(sorted(FIELDS), rng.randint(2, 4))

    def values(r: random.Random) -> tuple[str | int, ...]:
        return (*[r.choice(FIELDS[key]) for key in keys], r.randint(1, 99))

    drawn = draw(rng, split, values)
    record: dict[str, str | int] = dict(zip([*keys, "age"], drawn, strict=True))
    order = list(record)
    rng.shuffle(order)
    stated = ", ".join(f"{key} is {record[key]}" for key in order)
    schema = json.dumps({key: "integer" if key == "age" else "string" for key in record})
    return Example("json", f"Write JSON. Schema: {schema}. Data: {stated}.", json.dumps(record))


TOOLS: dict[str, tuple[str, str, list[str], str]] = {
    "get_weather": ("Get the weather of a city.", "city", CITIES, "What is the weather in {}?"),
    "find_person": ("Find a person by name.", "name", NAMES, "Where can I find {}?"),
    "buy_item": ("Buy an item.", "item", THINGS, "Please buy a {}."),
    "feed_animal": ("Feed an animal.", "animal", ANIMALS, "Please feed the {}."),
    "paint_wall": ("Paint the wall in a colour.", "colour", COLOURS, "Paint the wall {}."),
}


def tool_schema(name: str) -> dict[str, object]:
    """The OpenAI description of one tool."""
    about, argument, _, _ = TOOLS[name]
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def tool_system(tools: list[dict[str, object]]) -> str:
    """The system message that the chat template renders for these tools (no system message of the user's)."""
    listed = "\n".join(json.dumps(tool) for tool in tools)
    return (
        "You may call these tools:\n<tools>\n" + listed + "\n</tools>\n"
        'To call one, answer <tool_call>{"name": ..., "arguments": ...}</tool_call>'
    )


def tool_call(rng: random.Random, split: Split) -> tuple[str, Example]:
    """(system message with one to three tools, the request and the call that answers it)."""

    def sample(r: random.Random) -> tuple[tuple[str, ...], str, str]:
        listed = tuple(r.sample(sorted(TOOLS), r.randint(1, 3)))
        tool = r.choice(listed)
        return listed, tool, r.choice(TOOLS[tool][2])

    names, chosen, value = draw(rng, split, sample)
    _, argument, _, phrase = TOOLS[chosen]
    call = json.dumps({"name": chosen, "arguments": {argument: value}})
    system = tool_system([tool_schema(name) for name in names])
    return system, Example("tools", phrase.format(value), f"<tool_call>{call}</tool_call>")


def obedience(rng: random.Random, split: Split) -> tuple[str, Example]:
    """(system message that fixes how to answer, a greeting and the only right answer)."""
    name, other, word, item = draw(
        rng, split, lambda r: (r.choice(NAMES), r.choice(NAMES), r.choice(WORDS), r.choice(THINGS))
    )
    kind = rng.randrange(4)
    if kind == 0:
        system, answer = f"Your name is {name}. Greet the user by name.", f"Hello, {other}! My name is {name}."
        return system, Example("chat", f"Hello, I am {other}.", answer)
    if kind == 1:
        question = rng.choice([f"Where is the {item}?", "Who are you?", f"Do you know {other}?"])
        return f"Always answer with the word {word}.", Example("chat", question, word)
    if kind == 2:
        system = f"You are {name}. End every answer with the word {word}."
        return system, Example("chat", "What is your name?", f"My name is {name}. {word}")
    system = f"You are {name}. You sell only one thing: a {item}."
    return system, Example("chat", "What can I buy here?", f"You can buy a {item}.")


TASKS: dict[str, Task] = {
    "copying": copying,
    "reversing": reversing,
    "addition": addition,
    "subtraction": subtraction,
    "sorting": sorting,
    "counting": counting,
    "json": json_object,
}
