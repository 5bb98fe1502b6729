"""A whole model that has learnt something: stories260K must tell the stories it told elsewhere."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import BatchRow, build_batch
from engine.config import EngineConfig, resolve
from engine.loading import load_model, model_facts, open_checkpoint
from engine.runner import Runner
from kvcache.layout import PageLayout
from kvcache.policy import read_policy
from kvcache.storage import PageStorage

STORIES = Path(__file__).parents[3] / "shared/models/stories260K"
PAGE_SIZE = 16


def stories() -> Path:
    """The checkpoint and its expected answers, which are not part of the repository."""
    if not (STORIES / "expected_greedy.json").is_file():
        pytest.skip("the stories260K checkpoint does not lie beside the repository")
    return STORIES


def make_runner(folder: Path, policy: str) -> Runner:
    checkpoint = open_checkpoint(folder)
    config = EngineConfig(str(folder), kv_policy=policy, page_size=PAGE_SIZE, kv_memory=8 << 20, head_bits=16)
    plan = resolve(config, model_facts(checkpoint, config))
    sizes = checkpoint.config
    layout = PageLayout(read_policy(policy), sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, PAGE_SIZE)
    storage = PageStorage(layout, plan.num_pages, torch.device("cpu"))
    return Runner(load_model(checkpoint, plan).model, storage.layers)


def sum_logprob(logits: Tensor, token_ids: list[int]) -> float:
    """logits: [n, vocab], the rows that choose token_ids."""
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])
    return float(chosen.sum())


@pytest.mark.parametrize(("policy", "tolerance"), [("f32", 1e-3), ("f16", 2e-2)])
def test_greedy_stories(policy: str, tolerance: float) -> None:
    """All prompts decode together, their pages interleaved; every token was chosen with a margin of 0.003 or more.

    The sums of log-probabilities are given to four decimals. Over float16 pages each of the 100 terms may move by what
    rounding keys and values by 2^-11 moves a logit, some 1e-4.
    """
    cases: list[dict[str, Any]] = json.loads((stories() / "expected_greedy.json").read_text())
    runner = make_runner(STORIES, policy)
    contexts = [list(case["prompt_ids"]) for case in cases]
    tables: list[list[int]] = [[] for _ in cases]
    starts = [0] * len(cases)
    kept: list[list[Tensor]] = [[] for _ in cases]
    next_page = 0
    for _ in cases[0]["output_ids"]:
        rows = []
        for i, context in enumerate(contexts):
            while len(tables[i]) * PAGE_SIZE < len(context):
                tables[i].append(next_page)
                next_page += 1
            rows.append(BatchRow(context[starts[i] :], starts[i], tables[i], PAGE_SIZE, 1))
            starts[i] = len(context)
        for i, row in enumerate(runner.run(build_batch(rows))):
            kept[i].append(row)
            contexts[i].append(int(row.argmax()))
    for case, context, logits in zip(cases, contexts, kept, strict=True):
        answer = context[len(case["prompt_ids"]) :]
        assert answer == case["output_ids"]
        assert abs(sum_logprob(torch.stack(logits), answer) - case["sum_logprob"]) < tolerance


def test_prompt_rows_score_the_same_story() -> None:
    """The log-probabilities of a text are the same whether it was generated or read as a prompt."""
    case = json.loads((stories() / "expected_greedy.json").read_text())[0]
    runner = make_runner(STORIES, "f32")
    tokens = [*case["prompt_ids"], *case["output_ids"]]
    table = list(range(-(-len(tokens) // PAGE_SIZE)))
    logits = []
    for start, stop in pairwise([0, 33, 64, len(tokens)]):
        logits.append(runner.run(build_batch([BatchRow(tokens[start:stop], start, table, PAGE_SIZE, stop - start)])))
    first = len(case["prompt_ids"]) - 1
    found = sum_logprob(torch.cat(logits)[first:-1], case["output_ids"])
    assert abs(found - case["sum_logprob"]) < 1e-3
