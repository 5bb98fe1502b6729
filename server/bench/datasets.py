"""What is asked: prompts and lengths of answers. The same seed gives the same requests.

Lengths of made-up prompts are counted in words, which any server can take; the server's own count of tokens is what
results report.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.errors import BenchError

# Short common words: about one token each in most vocabularies.
TEXT = """
    the time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work number night point home water room mother area money story
    fact month lot right study book eye job word business issue side kind head house service friend father
"""
WORDS = TEXT.split()


@dataclass(frozen=True)
class Prompt:
    """One request."""

    text: str
    max_tokens: int  # of the answer


@dataclass(frozen=True)
class Lengths:
    """How long made-up prompts and their answers are."""

    input_words: int
    output_tokens: int
    spread: float = 0.0  # each length is uniform in [1 - spread, 1 + spread] times the one stated

    def __post_init__(self) -> None:
        if self.input_words < 1 or self.output_tokens < 1 or not 0 <= self.spread < 1:
            raise BenchError("--input-len and --output-len must be at least 1, --spread from 0 to below 1")

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """(words of a prompt, tokens of its answer)."""
        return self._near(self.input_words, rng), self._near(self.output_tokens, rng)

    def _near(self, length: int, rng: random.Random) -> int:
        return max(1, round(length * rng.uniform(1 - self.spread, 1 + self.spread)))


def random_prompts(count: int, lengths: Lengths, seed: int) -> list[Prompt]:
    """Words drawn at random, so that no two prompts begin alike for long."""
    rng = random.Random(seed)
    return [_made_up(rng, lengths) for _ in range(count)]


def shared_prefix_prompts(count: int, lengths: Lengths, seed: int, prefixes: int, prefix_words: int) -> list[Prompt]:
    """Random prompts behind one of `prefixes` beginnings of `prefix_words` words each: what a system prompt does."""
    if prefixes < 1 or prefix_words < 1:
        raise BenchError("a shared prefix needs at least one prefix of at least one word")
    rng = random.Random(seed)
    beginnings = [" ".join(rng.choices(WORDS, k=prefix_words)) for _ in range(prefixes)]
    made = [_made_up(rng, lengths) for _ in range(count)]
    return [Prompt(f"{rng.choice(beginnings)}\n\n{prompt.text}", prompt.max_tokens) for prompt in made]


def sharegpt_prompts(path: Path, count: int, seed: int, output_tokens: int | None) -> list[Prompt]:
    """The first turn of conversations in ShareGPT's form, a JSON list or one object a line:
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}.

    An answer is asked to be as many tokens as the recorded one has words, unless `output_tokens` says otherwise.
    """
    found = []
    for number, record in enumerate(_records(path), start=1):
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list):
            raise BenchError(f"{path}: record {number} has no list 'conversations'")
        texts = [str(turn.get("value") or "") for turn in turns[:2] if isinstance(turn, dict)]
        if len(texts) == 2 and all(text.strip() for text in texts):
            found.append(Prompt(texts[0], output_tokens or max(1, len(texts[1].split()))))
    if not found:
        raise BenchError(f"{path} holds no conversation of two turns")
    return _sample(found, count, seed)


def folder_prompts(folder: Path, count: int, seed: int, output_tokens: int) -> list[Prompt]:
    """Every text file of a folder is a prompt."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    found = [Prompt(text, output_tokens) for text in map(_text, files) if text.strip()]
    if not found:
        raise BenchError(f"{folder} is no folder with text files")
    return _sample(found, count, seed)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BenchError(f"{path} is not text in UTF-8: every file of the folder is sent as a prompt") from None


def _made_up(rng: random.Random, lengths: Lengths) -> Prompt:
    num_words, num_tokens = lengths.draw(rng)
    return Prompt(" ".join(rng.choices(WORDS, k=num_words)), num_tokens)


def _sample(found: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` of them in an order drawn from the seed; all of them before any comes a second time."""
    rng = random.Random(seed)
    chosen: list[Prompt] = []
    while len(chosen) < count:
        chosen += rng.sample(found, min(len(found), count - len(chosen)))
    return chosen


def _records(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            yield from json.loads(text)
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BenchError(f"{path} is neither a JSON list nor JSON lines: {error}") from None
