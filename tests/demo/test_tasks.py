"""Generators: seeded, split by content, and right by an independent solver."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest

from demo import recall, skills
from demo.stories import cast, sentences, story
from demo.text import ANSWER, Doc, Example, draw, is_held_out

FACT = re.compile(r"The (\w+) of (\w+) is (\w+)\.")
QUESTION = re.compile(r"What is the (\w+) of (\w+)\?.*?The \1 of \2 is (\w+)\.", re.DOTALL)
HOP = re.compile(r"What is the city of the friend of (\w+)\? The friend of \1 is (\w+)\. The city of \2 is (\w+)\.")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def solve(task: str, prompt: str) -> str:
    """The answer, worked out from the prompt alone."""
    head, _, rest = prompt.partition(": ")
    words = rest.split()
    if task == "arithmetic":
        expression = prompt.removeprefix("What is ").removesuffix("?")
        left, operator, right = expression.split()
        return f"{expression} = {int(left) + int(right) if operator == '+' else int(left) - int(right)}"
    if task == "sorting":
        return " ".join(sorted(words, key=int))
    if task == "counting":
        target = head.removeprefix("Count ")
        return f"{target}: {NUMBERS[words.count(target)]}"
    return " ".join(words if task == "copying" else words[::-1])


@pytest.mark.parametrize("name", [name for name in skills.TASKS if name != "json"])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_follow_from_prompts(name: str, split: str) -> None:
    rng = random.Random(1)
    for _ in range(50):
        example = skills.TASKS[name](rng, "train" if split == "train" else "held_out")
        assert example.answer == solve(example.task, example.prompt)


def test_json_answer_holds_the_stated_data_in_schema_order() -> None:
    rng = random.Random(2)
    for _ in range(50):
        example = skills.json_object(rng, "held_out")
        schema = json.loads(example.prompt.partition("Schema: ")[2].partition(" Data:")[0].rstrip("."))
        stated = dict(pair.split(" is ") for pair in example.prompt.partition("Data: ")[2].rstrip(".").split(", "))
        answer = json.loads(example.answer)
        assert list(answer) == list(schema)
        assert {key: str(value) for key, value in answer.items()} == stated
        assert all(isinstance(answer[key], int if kind == "integer" else str) for key, kind in schema.items())


def test_tool_calls_name_a_listed_tool_and_quote_the_request() -> None:
    rng = random.Random(3)
    for _ in range(50):
        system, example = skills.tool_call(rng, "held_out")
        call = json.loads(example.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert f'"name": "{call["name"]}"' in system
        assert all(value in example.prompt for value in call["arguments"].values())


@pytest.mark.parametrize("form", [recall.interleaved, recall.interview])
def test_every_recall_answer_was_stated_before(form: Callable[..., Doc]) -> None:
    rng = random.Random(4)
    for _ in range(20):
        text = form(rng, "train", sentences(rng, "train"), 6).text
        known: dict[tuple[str, str], str] = {}
        for match in FACT.finditer(text):
            known.setdefault((match[1], match[2]), match[3])
        questions = QUESTION.findall(text)
        assert questions
        assert all(known[attribute, name] == value for attribute, name, value in questions)


def test_two_hop_answers_follow_the_chain() -> None:
    rng = random.Random(5)
    for _ in range(20):
        text = recall.chains(rng, "train", [], 4).text
        stated = text.partition("What is")[0]
        facts = {(a, n): v for a, n, v in FACT.findall(stated)}
        hops = HOP.findall(text)
        assert len(hops) == 4
        assert all(facts["friend", a] == b and facts["city", b] == c for a, b, c in hops)


@pytest.mark.parametrize("make", [*skills.TASKS.values()])
def test_same_seed_same_examples_and_splits_share_none(make: Callable[[random.Random, str], Example]) -> None:
    first, again, held = random.Random(6), random.Random(6), random.Random(7)
    train = [make(first, "train") for _ in range(100)]
    assert train == [make(again, "train") for _ in range(100)]
    assert not {e.prompt for e in train} & {make(held, "held_out").prompt for _ in range(100)}


def test_held_out_codes_and_casts_never_train() -> None:
    rng = random.Random(8)
    assert not any(is_held_out(f.value) for f in recall.facts(rng, "train", 80) if f.value.isdigit())
    assert all(is_held_out(f.value) for f in recall.facts(rng, "held_out", 80))
    assert not is_held_out(draw(rng, "train", cast))
    assert is_held_out(draw(rng, "held_out", cast))


def test_stories_keep_their_hero_and_answers_carry_the_weight() -> None:
    text = story(random.Random(9), "train")
    hero = re.search(r"(?:named|called) (\w+)", text)
    assert hero
    assert text.count(hero[1]) > 2
    doc = recall.interleaved(random.Random(10), "train", [], 3)
    weighty = [piece for piece, weight in doc.pieces if weight == ANSWER]
    assert len(weighty) == 3
    assert all(re.fullmatch(r" \w+\.", piece) for piece in weighty)


def test_a_split_without_content_is_an_error() -> None:
    with pytest.raises(ValueError, match="no held_out content"):
        draw(random.Random(0), "held_out", lambda rng: next(n for n in range(99) if not is_held_out(n)))
