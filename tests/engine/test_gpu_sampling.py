"""Steps whose ids are drawn beside the logits, by a kernel that stands for a GPU's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

import kernels.sampling
from engine.core import EngineCore
from engine.messages import Event, Submit
from engine.sampling import Draw, Drawn, Sampler, sampler_for
from kernels.contract import KernelRefused, RowDraw, RowSpec, Scores
from kernels.sampling.edits import edited_rows
from kernels.sampling.reference import SamplingReference
from tests.engine.worlds import continuation, make_core, run, submit, tokens_of
from tests.kernels.interpreted_sampling import expected


@dataclass
class OnGpu:
    """Draws what the definition draws; every `left`-th draw, and log-probabilities of one, are left to the CPU."""

    left: int = 1 << 30
    num_scored: int = 0
    name: str = "triton"
    num_drawn: int = 0
    refusal: str | None = None

    def refuses(self, spec: RowSpec) -> str | None:
        return self.refusal

    def draw_all(self, logits: Tensor, draws: Sequence[RowDraw], before: Tensor | None = None) -> Tensor:
        ids = []
        for draw in draws:
            self.num_drawn += 1
            rows, plain = logits, draw
            if draw.edits is not None:
                rows, plain = edited_rows(logits, [draw.row], [draw.edits], before), replace(draw, row=0, edits=None)
            ids.append(-1 if self.num_drawn % self.left == 0 else expected(rows, plain))
        return torch.tensor(ids, dtype=torch.int32)

    def score_all(self, logits: Tensor, pairs: Sequence[tuple[int, int]], tokens: Tensor, num_top: int) -> Scores:
        ids, values = [], []
        for row, place in pairs:
            self.num_scored += 1
            token = int(tokens[place])
            is_left = token < 0 or self.num_scored % self.left == 0
            own, top = SamplingReference().log_probs(logits[row], max(token, 0), num_top)
            ids.append([-1 if is_left else token, *(near for near, _ in top)])
            values.append([own, *(value for _, value in top)])
        return Scores(torch.tensor(ids), torch.tensor(values, dtype=torch.float64))


@dataclass
class Watched(SamplingReference):
    """How many rows the CPU looked at."""

    rows: list[Tensor] = field(default_factory=list)

    def argmax(self, logits: Tensor) -> int | None:
        self.rows.append(logits)
        return super().argmax(logits)


REQUESTS: list[dict[str, Any]] = [
    {"num_prompt_logprobs": 2},  # first, so that its rows stand before others'
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "seed": 4, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.5, "seed": 5, "n": 3},
    {"num_logprobs": 0, "seed": 1},
    {"temperature": 1.5, "seed": 8, "num_logprobs": 2, "n": 2},
    {"num_logprobs": 5},
    {"num_logprobs": 2, "presence_penalty": 0.5},
    {"logit_bias": {7: 4.0}},
    {"temperature": 0.7, "seed": 6, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.3, "num_prompt_logprobs": 0},
    {"min_tokens": 8},
    {"max_tokens": 0},
]


def events_of(sampler: Sampler, submits: Sequence[Submit]) -> list[Event]:
    core = EngineCore(replace(make_core().parts, sampler=sampler))
    return [without_times(event) for event in run(core, submits)]


def without_times(event: Event) -> Event:
    times = {name: 0.0 for name in ("queued_s", "prefill_s", "decode_s") if hasattr(event, name)}
    return msgspec.structs.replace(event, **times)


def every_request() -> list[Submit]:
    """Prompts of several lengths, some longer than a step."""
    return [submit(f"r{i}", list(range(1, 4 + 5 * i)), **rules) for i, rules in enumerate(REQUESTS)]


@pytest.mark.parametrize("left", [1 << 30, 3, 1])
def test_events_are_those_of_the_cpu(left: int) -> None:
    """Bug: an id of another row or choice, one drawn where a rule was to be applied, or -1 sent as a token."""
    on_gpu = OnGpu(left)
    found = events_of(Sampler(SamplingReference(), on_gpu), every_request())
    assert found == events_of(Sampler(SamplingReference()), every_request())
    assert on_gpu.num_drawn > 40


def test_the_cpu_sees_no_logits() -> None:
    """Bug: half a megabyte copied for every token of a request that needs an id."""
    watched = Watched()
    events_of(Sampler(watched, OnGpu()), every_request())
    assert not watched.rows


RULES: list[dict[str, Any]] = [
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.3, "repetition_penalty": 0.8},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.7, "logit_bias": {3: 1.1, 7: -9.0}},
    {"presence_penalty": 0.1, "min_tokens": 9, "stop_token_ids": (3, 5), "logit_bias": {5: 2.0}},
    {"logit_bias": {3: 1.1}},
]


@pytest.mark.parametrize("last", [3, 5, 7, 8, 0])
def test_a_row_is_edited_as_if_its_last_token_were_known(last: int) -> None:
    """To the last bit: a token that was in the answer, in the prompt, biased, banned, or nowhere. Bugs: one that is
    counted twice or not at all, edited twice, or by the rules of the draw beside it; a ban that it lifts."""
    tokens, logits = [7, 8, 3, 3, 5], torch.randn(2, 10, generator=torch.Generator().manual_seed(last))
    before = torch.tensor([6, last, -1], dtype=torch.int32)
    ahead, known = [], []
    for rules in RULES:
        sampling = submit("r", [1], max_tokens=20, **rules).sampling
        ahead.append(Draw(sampling, 0, 0, tokens, 2, (0,), last=1).edits())
        known.append(Draw(sampling, 0, 0, [*tokens, last], 2, (0,)).edits())
    edits = [one for one in ahead if one is not None]
    assert len(edits) == len(RULES)
    found = edited_rows(logits, [i % 2 for i in range(len(edits))], edits, before)
    for i, edit in enumerate(known):
        row = logits[i % 2].clone()
        assert edit is not None
        row[edit.ids] = edit.of(row[edit.ids])
        assert torch.equal(found[i], row)


def test_min_tokens_ban_endings_no_longer_than_that() -> None:
    """Bug: the token that is not known yet not counted, or the last one of those that are."""
    greedy = continuation([1, 2, 3], 9)
    for least in (2, 6):
        rules: dict[str, Any] = {"stop_token_ids": tuple(greedy[least:]), "min_tokens": least, "max_tokens": 9}
        events = events_of(Sampler(SamplingReference(), OnGpu()), [submit("r", [1, 2, 3], **rules)])
        assert tokens_of(events, "r") == greedy[: least + 1]


def test_broken_logits_fail_the_request_that_has_them() -> None:
    """Bug: -1 where the largest is not finite, taken for a row that the CPU can draw from."""
    draw = Draw(submit("r", [1]).sampling, 0, 0, [1], 1, ())
    logits = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    sampler = Sampler(SamplingReference(), OnGpu())
    assert sampler.launch(logits, [(1, draw), (0, draw)]).read().drawn == [Drawn(1), None]
    with pytest.raises(RuntimeError, match="not finite"):
        sampler.choose(logits[0], draw)


def test_what_serves_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a GPU whose logits go through the CPU without a word, or a back end that was not asked for."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def said(device: torch.device, insisted: str | None = None) -> list[tuple[str, str]]:
        return [(what, str(choice)) for what, choice in sampler_for(1000, device, insisted)[1]]

    monkeypatch.setattr(kernels.sampling, "ON_GPU", OnGpu())
    assert [what for what, _ in said(cpu)] == ["sampling"]
    assert said(cuda)[0] == ("sampling", "triton")
    assert said(cuda)[1][0] == "sampling left to the CPU"
    assert said(cuda, "triton-fixed") == said(cuda, "triton") == said(cuda)
    (asked,) = said(cuda, "reference")
    assert asked[1].startswith("reference (triton: not the requested 'reference'")
    monkeypatch.setattr(kernels.sampling, "ON_GPU", OnGpu(refusal="it is too small"))
    ((_, refused),) = said(cuda)
    assert "triton: it is too small" in refused
    assert sampler_for(1000, cuda, None)[0].on_gpu is None
    with pytest.raises(KernelRefused, match="no kernel serves sampling on cuda: triton: it is too small"):
        sampler_for(1000, cuda, "triton")
