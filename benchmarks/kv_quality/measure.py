"""One subject -> what its cache costs: loss, divergence, what it recovers of dropped history, what it finds again."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.kv_quality.scoring import Engine, mean
from benchmarks.kv_quality.texts import Question, Text

LEAST_LOSS = 0.01  # nats a token: where dropping history costs less, what is recovered of it says nothing
PLAIN = ("chapter", "stories", "facts")  # what is read from beginning to end
EDGES = (128, 256, 512, 1024)  # tokens: where bins of distances end

Readings = dict[str, list["Reading"]]  # by what texts show


@dataclass(frozen=True)
class Reading:
    """One text under one subject."""

    loss: float  # nats a token
    divergence: float  # mean KL of the next-token distribution from that of a float32 cache, nats
    right: float  # share of tokens that are the likeliest


class Reader:
    """Held-out texts, and what a float32 cache makes of them."""

    def __init__(self, engine: Engine, held_out: Sequence[Text]) -> None:
        self._texts = held_out
        self._exact = [engine.score(text.ids) for text in held_out]
        self.exact = self._readings(self._exact)

    def read(self, engine: Engine) -> Readings:
        return self._readings(engine.score(text.ids) for text in self._texts)

    def _readings(self, scored: Iterable[Tensor]) -> Readings:
        found: Readings = {}
        for text, exact, scores in zip(self._texts, self._exact, scored, strict=True):
            for name, positions in text.counted.items():
                if positions:
                    found.setdefault(name, []).append(_reading(scores, exact, text.ids, positions))
        return found


def _reading(scores: Tensor, exact: Tensor, ids: list[int], positions: list[int]) -> Reading:
    """scores, exact: [num_tokens, vocab], log-probabilities of the token that follows."""
    before = torch.tensor(positions) - 1
    rows, true = scores[before], exact[before]
    wanted = torch.tensor(ids)[before + 1]
    return Reading(
        loss=-float(rows.gather(1, wanted[:, None]).double().mean()),
        divergence=float((true.exp() * (true - rows)).sum(-1).double().mean()),
        right=float((rows.argmax(-1) == wanted).double().mean()),
    )


def losses(readings: Readings) -> dict[str, float]:
    """By what is shown, and of all plain texts."""
    by_name = {name: mean([reading.loss for reading in held]) for name, held in readings.items()}
    return {"all": mean([reading.loss for name in PLAIN for reading in readings.get(name, ())])} | by_name


def compared(found: Readings, exact: Readings, dropped: Readings | None) -> dict[str, Any]:
    """A subject's losses beside those of a float32 cache, and of one that drops what is quantized."""
    own, best = losses(found), losses(exact)
    pairs = [(a.loss, b.loss) for name in PLAIN for a, b in zip(found.get(name, ()), exact.get(name, ()), strict=True)]
    row: dict[str, Any] = {
        "loss": own["all"],
        "change": own["all"] / best["all"] - 1,
        "change_error": standard_error([a - b for a, b in pairs]) / best["all"],
        "excess": {kind: own[kind] - best[kind] for kind in own},
        "kl": mean([reading.divergence for name in PLAIN for reading in found.get(name, ())]),
        "copied": mean([reading.right for reading in found["copy"]]),
    }
    if dropped is not None:
        worst = losses(dropped)
        row["recovered"] = {kind: recovered(worst[kind], own[kind], best[kind]) for kind in own}
    return row


def standard_error(differences: Sequence[float]) -> float:
    """Of their mean, over texts; 0 for a single one, which says nothing of it."""
    return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0


def recovered(dropped: float, found: float, exact: float) -> float | None:
    """The share of what dropping history costs that is not lost; None when it costs next to nothing."""
    return None if dropped - exact < LEAST_LOSS else (dropped - found) / (dropped - exact)


def find(engine: Engine, groups: Sequence[Sequence[Question]]) -> dict[str, Any]:
    """Shares of questions answered right by greedy decoding, by distance. Those of a group are about one text, which
    is read once: its prefix is found by all but the first."""
    hits: dict[str, list[bool]] = {}
    for group in groups:
        length = max(len(question.answer) for question in group)
        prompts = [question.prompt for question in group]
        answers = engine.answer(prompts[:1], length) + engine.answer(prompts[1:], length)
        for question, answer in zip(group, answers, strict=True):
            right = answer[: len(question.answer)] == question.answer
            hits.setdefault(span(question.distance), []).append(right)
    beyond = [right for name, held in hits.items() if name != span(0) for right in held]
    found: dict[str, Any] = {name: mean(hits[name]) for name in sorted(hits, key=lambda name: int(name.split("-")[0]))}
    return found | {"beyond": mean(beyond) if beyond else None, "questions": len(beyond)}


def span(distance: int) -> str:
    """The bin of a distance, as text: "128-255"."""
    lows = [0, *EDGES]
    index = max(i for i, low in enumerate(lows) if low <= distance)
    return f"{lows[index]}-{EDGES[index] - 1}" if index < len(EDGES) else f"{lows[index]}-"
