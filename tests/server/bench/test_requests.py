"""The load test: when requests go out, and what they ask."""

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from server.bench import datasets
from server.bench.arrivals import Arrivals
from server.bench.datasets import Lengths, Prompt
from server.bench.errors import BenchError

# ---- arrivals --------------------------------------------------------------------------------------------------------


def gaps(arrivals: Arrivals, count: int = 4000) -> list[float]:
    times = arrivals.times(count, seed=1)
    return [after - before for before, after in pairwise(times)]


def test_evenly_spaced_requests_are_one_period_apart() -> None:
    """Bug: a rate taken for a period."""
    assert gaps(Arrivals(rate=4, burstiness=math.inf), 5) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variance_of_their_gamma_distribution(burstiness: float) -> None:
    """Bug: burstiness that changes the rate. Bounds: 5 standard errors; a gamma's variance is mean^2 / shape, its
    fourth central moment (3 + 6 / shape) variance^2."""
    found = gaps(Arrivals(rate=2, burstiness=burstiness))
    variance = 0.25 / burstiness
    assert abs(statistics.mean(found) - 0.5) < 5 * math.sqrt(variance / len(found))
    error = variance * math.sqrt((2 + 6 / burstiness) / len(found))
    assert abs(statistics.variance(found) - variance) < 5 * error


def test_a_ramp_ends_at_its_rate() -> None:
    """Bug: a ramp that leads down, or beyond the rate."""
    found = gaps(Arrivals(rate=10, burstiness=math.inf, ramp_from=1), 101)
    assert found[0] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(1 / (1 + 0.99 * 9))
    assert found == sorted(found, reverse=True)


def test_the_same_seed_sends_at_the_same_times() -> None:
    assert Arrivals(rate=3).times(50, 7) == Arrivals(rate=3).times(50, 7) != Arrivals(rate=3).times(50, 8)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "--rate"),
        ({"rate": 0}, "--rate"),
        ({"clients": 0}, "--clients"),
        ({"rate": 1, "burstiness": -1}, "--burst"),
        ({"clients": 1, "burstiness": 0.5}, "--burstiness is of requests at a --rate"),
        ({"clients": 1, "ramp_from": 1}, "--ramp needs"),
    ],
)
def test_impossible_arrivals_are_refused_by_name(options: dict[str, float], named: str) -> None:
    with pytest.raises(BenchError, match=named):
        Arrivals(**options)  # type: ignore[arg-type]


# ---- datasets --------------------------------------------------------------------------------------------------------


def test_made_up_prompts_have_the_lengths_asked_for() -> None:
    prompts = datasets.random_prompts(50, Lengths(20, 10, spread=0.5), seed=3)
    lengths = [len(prompt.text.split()) for prompt in prompts]
    assert min(lengths) >= 10
    assert max(lengths) <= 30
    assert len(set(lengths)) > 1
    assert prompts == datasets.random_prompts(50, Lengths(20, 10, spread=0.5), seed=3)


def test_shared_prefixes_are_shared() -> None:
    """Bug: a fresh prefix for each prompt, so that a prefix cache finds nothing."""
    prompts = datasets.shared_prefix_prompts(30, Lengths(5, 5), 0, prefixes=2, prefix_words=8)
    assert len({prompt.text.split("\n\n")[0] for prompt in prompts}) == 2
    assert len({prompt.text for prompt in prompts}) > 2


@pytest.mark.parametrize("as_lines", [True, False])
def test_sharegpt_gives_the_first_turn_and_the_length_of_the_second(tmp_path: Path, as_lines: bool) -> None:
    records = [
        {"conversations": [{"from": "human", "value": "hi there"}, {"from": "gpt", "value": "one two three"}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
    ]
    path = tmp_path / "data.json"
    path.write_text("\n".join(map(json.dumps, records)) if as_lines else json.dumps(records))
    assert datasets.sharegpt_prompts(path, 2, 0, None) == [Prompt("hi there", 3)] * 2
    assert datasets.sharegpt_prompts(path, 1, 0, 9) == [Prompt("hi there", 9)]


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("{")
    (tmp_path / "other").write_text('[{"text": "x"}]')
    for name, complaint in (("broken", "neither"), ("other", "conversations"), ("absent", "No such file")):
        with pytest.raises(BenchError, match=complaint):
            datasets.sharegpt_prompts(tmp_path / name, 1, 0, None)
    with pytest.raises(BenchError, match="no folder"):
        datasets.folder_prompts(tmp_path / "absent", 1, 0, 1)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(BenchError, match=r"picture\.png is not text"):
        datasets.folder_prompts(tmp_path, 1, 0, 1)
