"""Logits to ids, one row at a time."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.messages import Sampling
from engine.sampling import BadLogits, Draw, uniform_at
from tests.engine.worlds import SAMPLER


def draw_of(tokens: list[int] | None = None, num_prompt: int = 0, seed: int = 0, **rules: Any) -> Draw:
    sampling = Sampling(max_tokens=10, **rules)
    return Draw(sampling, seed, 0, tokens or [], num_prompt, eos_token_ids=(0,))


def frequencies(logits: Tensor, num_draws: int = 4000, **rules: Any) -> dict[int, float]:
    counts = Counter(SAMPLER.choose(logits, draw_of(seed=seed, **rules)) for seed in range(num_draws))
    return {token: count / num_draws for token, count in counts.items()}


def within_noise(observed: float, expected: float, num_draws: int = 4000) -> bool:
    """Five standard deviations of a binomial share: a false alarm once in two million draws of the test."""
    return abs(observed - expected) <= 5 * math.sqrt(expected * (1 - expected) / num_draws)


LOGITS = torch.tensor([0.1, 2.0, 1.0, 3.0, -1.0])


def test_greedy_takes_the_largest() -> None:
    assert SAMPLER.choose(LOGITS, draw_of(temperature=0.0)) == 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_follow_the_softmax(temperature: float) -> None:
    """Bug: dividing by the temperature twice, or drawing from logits instead of probabilities."""
    observed = frequencies(LOGITS, temperature=temperature)
    for token, expected in enumerate(torch.softmax(LOGITS / temperature, 0).tolist()):
        assert within_noise(observed.get(token, 0.0), expected)


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"top_k": 2}, {3, 1}),
        ({"top_k": 1}, {3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {3}),  # 0.61: the first alone reaches it
        ({"top_p": 0.65}, {3, 1}),
        ({"top_p": 1e-9}, {3}),
        ({"min_p": 0.3}, {3, 1}),  # e^-1 of the largest is 0.37, e^-2 is 0.14
        ({"top_k": 3, "top_p": 0.97}, {3, 1, 2}),
    ],
)
def test_filters_keep_exactly_these(rules: dict[str, Any], kept: set[int]) -> None:
    observed = frequencies(LOGITS, **rules)
    assert set(observed) == kept
    probs = torch.softmax(LOGITS, 0)
    total = sum(float(probs[token]) for token in kept)
    for token in kept:
        assert within_noise(observed[token], float(probs[token]) / total)


def test_presence_and_frequency_count_the_answer_only() -> None:
    """Bug: penalising the prompt's tokens, which is repetition_penalty's work."""
    history = draw_of([3, 3, 3], num_prompt=3, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.4)
    assert SAMPLER.choose(LOGITS, history) == 3
    repeated = draw_of([3, 3, 3, 3], num_prompt=1, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.4)
    assert SAMPLER.choose(LOGITS, repeated) == 1  # 3.0 - 0.5 - 3 * 0.4 = 1.3 < 2.0


def test_repetition_penalty_counts_prompt_and_answer_and_pushes_negatives_down() -> None:
    logits = torch.tensor([-1.0, -1.5])
    assert SAMPLER.choose(logits, draw_of([0], num_prompt=1, temperature=0.0, repetition_penalty=2.0)) == 1


def test_logit_bias_moves_and_bans() -> None:
    assert SAMPLER.choose(LOGITS, draw_of(temperature=0.0, logit_bias={4: 5.0})) == 4
    assert SAMPLER.choose(LOGITS, draw_of(temperature=0.0, logit_bias={3: -100.0})) == 1


def test_min_tokens_bans_every_ending_until_then() -> None:
    logits = torch.tensor([9.0, 8.0, 1.0])
    rules: dict[str, Any] = {"temperature": 0.0, "min_tokens": 1, "stop_token_ids": (1,)}
    assert SAMPLER.choose(logits, draw_of([5], num_prompt=1, **rules)) == 2
    assert SAMPLER.choose(logits, draw_of([5, 2], num_prompt=1, **rules)) == 0
    assert SAMPLER.choose(logits, draw_of([5], num_prompt=1, ignore_eos=True, **rules)) == 0


def by_definition(logits: Tensor, draw: Draw) -> Tensor:
    """Id by id, each operation rounded to float32."""
    s, answer = draw.sampling, draw.tokens[draw.num_prompt :]
    banned = {*s.stop_token_ids, *draw.eos_token_ids} if len(answer) < s.min_tokens else set()
    row = []
    for token, value in enumerate(logits):
        x = value + torch.tensor(s.logit_bias.get(token, 0), dtype=torch.float32)
        if token in draw.tokens:
            x = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
        if count := answer.count(token):
            x = x - (s.presence_penalty + s.frequency_penalty * torch.tensor(count, dtype=torch.float32))
        row.append(torch.tensor(-math.inf) if token in banned else x)
    return torch.stack(row)


@pytest.mark.parametrize("least", [0, 9], ids=["free", "banned"])
@pytest.mark.parametrize("repetition", [{}, {"repetition_penalty": 1.7}], ids=["", "repetition"])
@pytest.mark.parametrize(
    "counted", [{}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.3}, {"presence_penalty": 0.7}], ids=str
)
@pytest.mark.parametrize("bias", [{}, {4: 1.1}, {1: 1.1, 2: -0.3, 5: 2, 6: 0.1, 8: 4.0}], ids=str)
def test_rules_meet_on_one_id(bias: dict[int, float], counted: Any, repetition: Any, least: int) -> None:
    """To the last bit, on the CPU and as edits for a kernel: ids that are in the prompt, in the answer, biased, banned,
    several of these or none. Bugs: a term in the column of another id, an id named twice, one that only a bias names
    scaled, a whole bias among fractions that makes all of them whole."""
    tokens, logits = [0, 1, 2, 2, 3, 3, 3, 6, 7], torch.randn(10, generator=torch.Generator().manual_seed(1))
    draw = draw_of(tokens, 3, logit_bias=bias, min_tokens=least, stop_token_ids=(5, 6, 7, 5), **counted, **repetition)
    expected, edits, row = by_definition(logits, draw), draw.edits(), logits.clone()
    if edits is not None:
        assert len(set(edits.ids.tolist())) == len(edits.ids)
        row[edits.ids] = edits.of(row[edits.ids])
    assert torch.equal(row, expected)
    assert torch.equal(draw.edited(logits), expected)


@pytest.mark.parametrize("rules", [{"presence_penalty": 1.0}, {"repetition_penalty": 2.0}], ids=str)
def test_penalties_of_no_tokens(rules: dict[str, Any]) -> None:
    """Bug: an answer without tokens yet, of which no tensor is made."""
    assert draw_of(**rules).edits() is None
    assert torch.equal(draw_of(**rules).edited(LOGITS), LOGITS)


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """Bug: logits divided until they overflow leave NaN, and the last token of the vocabulary is drawn."""
    assert SAMPLER.choose(LOGITS, draw_of(temperature=temperature)) == 3


def test_every_position_draws_anew() -> None:
    """Bug: one number for the whole answer repeats the same choice at every position."""
    flat = torch.zeros(50)
    tokens = [SAMPLER.choose(flat, draw_of([1] * num_generated, seed=3)) for num_generated in range(20)]
    assert len(set(tokens)) > 10


def test_the_input_row_is_left_alone() -> None:
    """Bug: rules applied in place change the log-probabilities reported for the row, and siblings' draws."""
    row = LOGITS.clone()
    SAMPLER.choose(
        row, draw_of([1], num_prompt=0, temperature=0.5, logit_bias={1: 3.0}, repetition_penalty=2.0, top_k=2)
    )
    assert torch.equal(row, LOGITS)


@pytest.mark.parametrize("row", [[1.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_broken_rows_are_refused(row: list[float]) -> None:
    with pytest.raises(BadLogits):
        SAMPLER.choose(torch.tensor(row), draw_of(temperature=0.0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_that_ban_every_token_are_refused(temperature: float) -> None:
    """Bug: 0 / 0 in the softmax of a row without a finite logit, and some token drawn from it."""
    rules: dict[str, Any] = {"temperature": temperature, "min_tokens": 1, "stop_token_ids": (0, 1)}
    with pytest.raises(BadLogits, match="min_tokens"):
        SAMPLER.choose(torch.zeros(2), draw_of(**rules))


def test_rows_with_banned_tokens_still_draw() -> None:
    observed = frequencies(torch.tensor([-math.inf, 0.0, 0.0]), num_draws=200)
    assert set(observed) == {1, 2}


def test_uniform_is_fixed_and_spread() -> None:
    """Same key, same number; every part of the key matters; the mean of 4,000 is a half within five deviations."""
    assert uniform_at(1, 2, 3) == uniform_at(1, 2, 3)
    assert len({uniform_at(1, 2, 3), uniform_at(2, 2, 3), uniform_at(1, 3, 3), uniform_at(1, 2, 4)}) == 4
    values = [uniform_at(seed, 0, 0) for seed in range(4000)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 4000 - 0.5) < 5 / math.sqrt(12 * 4000)
    assert uniform_at(-1, 0, 0) == uniform_at(2**64 - 1, 0, 0)


def test_logprobs_are_sorted_and_hold_the_chosen() -> None:
    entry = SAMPLER.logprobs_of(LOGITS, token=0, num_top=2)
    scores = torch.log_softmax(LOGITS.double(), 0).tolist()
    assert entry.token == 0
    assert entry.logprob == pytest.approx(scores[0], rel=1e-12)
    assert [token for token, _ in entry.top] == [3, 1]
    assert [score for _, score in entry.top] == pytest.approx([scores[3], scores[1]], rel=1e-12)
    assert SAMPLER.logprobs_of(LOGITS, token=0, num_top=99).top[-1][0] == 4
