"""Measure a checkpoint: `python -m demo.evaluate [FOLDER]`; the default is the packed one that ships beside this file.

Every exact match is scored teacher-forced: all answer tokens are the argmax, which is when greedy decoding gives the
answer. Contents are held out. Needs transformers, and for a packed checkpoint nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3ForCausalLM

from demo import books as library
from demo import recall, skills
from demo.books import Books
from demo.cases import Case, recall_case, score
from demo.packed import plain_weights
from demo.stories import story
from demo.text import CLOSE, Example, chat_prompt

DISTANCES = (16, 64, 128, 256, 512, 1024, 2048, 3000, 4000)  # tokens between the fact and the question
WINDOW = 128  # tokens of history left in the control
CHAPTER = Path(__file__).parent / "heldout_chapter.txt"


@dataclass(frozen=True)
class Subject:
    """What is measured, and how many questions of each kind."""

    model: Qwen3ForCausalLM
    tokenizer: Tokenizer
    books: Books
    cases: int

    def logits(self, ids: Tensor) -> Tensor:
        """ids [batch, seq] -> logits [batch, seq, vocab]."""
        out: Tensor = self.model(ids, use_cache=False).logits
        return out

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found


def load(folder: Path, books: Path | None, cases: int) -> Subject:
    """Read a checkpoint, packed or not, as float32."""
    config, weights = plain_weights(folder)
    model = Qwen3ForCausalLM(config)
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    shelf = library.load(books)
    if not shelf.held_out:
        shelf = Books([], library.paragraphs(CHAPTER.read_text(encoding="utf-8")))
    return Subject(model, Tokenizer.from_file(str(folder / "tokenizer.json")), shelf, cases)


def recall_table(subject: Subject, window: int) -> dict[str, float]:
    """Exact match by distance; a `window` above zero drops the history before it."""
    found = {}
    for distance in DISTANCES:
        rng = random.Random(distance)
        cases = [recall_case(rng, subject.tokenizer, subject.books, distance, "held_out") for _ in range(subject.cases)]
        found[str(distance)] = score(subject.logits, cases, max(1, 8192 // (distance + 128)), window)
    return found


def chain_cases(subject: Subject) -> list[Case]:
    """Two-hop questions about three held-out chains stated just before."""
    cases = []
    rng = random.Random(7)
    for _ in range(subject.cases):
        text = recall.chains(rng, "held_out", [], 3).text
        head, _, rest = text.partition("What is the city of")
        question, _, answer = rest.partition(" is")
        cases.append(
            Case(subject.ids(f"{head}What is the city of{question} is"), subject.ids(answer.split(" What")[0]))
        )
    return cases


def task_cases(subject: Subject, make: Callable[[random.Random], tuple[str, Example]]) -> list[Case]:
    """One user message and its answer for each example; `make` returns (system message, example)."""
    rng = random.Random(11)
    cases = []
    for _ in range(subject.cases):
        system, example = make(rng)
        prompt = chat_prompt(example.prompt, system)
        cases.append(Case(subject.ids(prompt), subject.ids(example.answer + CLOSE)))
    return cases


def skill_table(subject: Subject) -> dict[str, float]:
    """Exact match of every skill on held-out contents."""
    makers: dict[str, Callable[[random.Random], tuple[str, Example]]] = {
        name: lambda rng, task=task: ("", task(rng, "held_out"))  # type: ignore[misc]
        for name, task in skills.TASKS.items()
    }
    makers["tool call"] = lambda rng: skills.tool_call(rng, "held_out")
    makers["system prompt obeyed"] = lambda rng: skills.obedience(rng, "held_out")
    found = {name: score(subject.logits, task_cases(subject, make), 16) for name, make in makers.items()}
    found["two-hop chain"] = score(subject.logits, chain_cases(subject), 16)
    return found


def complete(subject: Subject, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """Continue a prompt: greedy at temperature 0, else sampled from the most likely 95 %."""
    torch.manual_seed(seed)
    ids = torch.tensor([subject.ids(prompt)])
    ends = [subject.tokenizer.token_to_id(mark) for mark in (CLOSE, "<|endoftext|>")]
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    out = subject.model.generate(  # type: ignore[misc]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        eos_token_id=ends,
        pad_token_id=ends[1],
        **sampling,
    )
    text: str = subject.tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return text


def json_valid(subject: Subject) -> float:
    """Share of generated answers to JSON requests that parse and have exactly the keys and types asked for."""
    rng = random.Random(5)
    good = 0
    for _ in range(max(8, subject.cases // 4)):
        example = skills.json_object(rng, "held_out")
        wanted = json.loads(example.answer)
        try:
            made = json.loads(complete(subject, chat_prompt(example.prompt), 96, 0.0, 0))
        except json.JSONDecodeError:
            continue
        good += isinstance(made, dict) and {k: type(v) for k, v in made.items()} == {
            k: type(v) for k, v in wanted.items()
        }
    return good / max(8, subject.cases // 4)


def perplexity(subject: Subject, text: str) -> float:
    """exp of the mean loss per token over windows of 1,024 tokens."""
    ids = subject.ids(text)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, 1024):
        row = torch.tensor([ids[start : start + 1025]])
        loss = torch.nn.functional.cross_entropy(subject.logits(row[:, :-1])[0], row[0, 1:], reduction="sum")
        total, count = total + float(loss), count + row.shape[1] - 1
    return math.exp(total / count)


def held_out_stories(count: int) -> str:
    """Stories whose casts never occur in training."""
    rng = random.Random(3)
    return "\n\n".join(story(rng, "held_out") for _ in range(count))


@torch.inference_mode()
def measure(subject: Subject) -> dict[str, object]:
    """Everything the model card states."""
    return {
        "recall": recall_table(subject, 0),
        f"recall, last {WINDOW} tokens only": recall_table(subject, WINDOW),
        "skills": skill_table(subject),
        "json parses with the stated keys and types": json_valid(subject),
        "perplexity": {
            "held-out stories": perplexity(subject, held_out_stories(40)),
            "held-out book chapter": perplexity(subject, "\n\n".join(library.paragraphs(CHAPTER.read_text("utf-8")))),
        },
    }


def show(found: dict[str, object]) -> None:
    """Print the measurements as tables, then as one line of JSON."""
    for title, value in found.items():
        if isinstance(value, dict):
            print(f"\n{title}")
            for name, number in value.items():
                print(f"  {name:>24}  {number:8.2f}" if title == "perplexity" else f"  {name:>24}  {number:8.1%}")
        else:
            print(f"\n{title}: {value:.1%}")
    print(f"\n{json.dumps(found)}")


def main() -> None:
    """Measure one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "checkpoint")
    parser.add_argument(
        "--books", type=Path, default=None, help="folder of books for filler; else the chapter shipped here"
    )
    parser.add_argument("--cases", type=int, default=48, help="questions of each kind")
    args = parser.parse_args()
    subject = load(args.folder, args.books, args.cases)
    show(measure(subject))
    for seed in range(2):
        print(f"\nOnce upon a time{complete(subject, 'Once upon a time', 220, 0.7, seed)}")


if __name__ == "__main__":
    main()
