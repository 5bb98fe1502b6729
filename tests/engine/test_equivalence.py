"""The whole engine on real models, under memory pressure: each token's log-probability is transformers'."""

from pathlib import Path

import pytest
import torch

from engine.assembly import build
from engine.config import EngineConfig
from engine.messages import Event, Token
from tests.engine.models.oracle import TIMES_NOISE, exact_copy, write_checkpoint
from tests.engine.models.variants import variants
from tests.engine.worlds import run, submit, tokens_of

NUM_PAGES = 4
PAGE_SIZE = 16


def logprobs_of(events: list[Event], request_id: str) -> list[float]:
    return [e.logprobs.logprob for e in events if isinstance(e, Token) and e.id == request_id and e.logprobs]


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen2-tied", "qwen3"])
@torch.no_grad()
def test_preemption_prefix_hits_and_chunks_change_no_logits(name: str, tmp_path: Path) -> None:
    """Bug: keys recomputed at wrong positions after preemption, or read from pages that another request wrote.

    A log-softmax moves by at most twice what its logits move, so the bound on logits (see the oracle) doubles.
    """
    config = variants()[name]
    theirs = write_checkpoint(tmp_path, config)
    exact = exact_copy(theirs, config)
    num_bytes = build(EngineConfig(str(tmp_path), kv_policy="f32", kv_memory=1 << 24))[1].kv_bytes_per_token
    core, _ = build(
        EngineConfig(
            str(tmp_path),
            kv_policy="f32",
            page_size=PAGE_SIZE,
            kv_memory=NUM_PAGES * PAGE_SIZE * num_bytes,
            max_num_seqs=4,
            max_batch_tokens=7,
        )
    )
    shared = [i * 7 % 101 for i in range(18)]
    prompts = {str(i): [*shared, *[i] * (i + 1)] for i in range(4)}
    requests = [
        submit(key, prompt, max_tokens=36 - len(prompt), temperature=1.0, seed=i, num_logprobs=0, ignore_eos=True)
        for i, (key, prompt) in enumerate(prompts.items())
    ]
    events = run(core, [requests[0]]) + run(core, requests[1:])
    stats = core.stats()
    assert stats.preemptions_total > 0
    assert stats.prefix_hits_total > 0
    for key, prompt in prompts.items():
        answer = tokens_of(events, key)
        ids = torch.tensor([[*prompt, *answer]])
        logits = exact(ids).logits[0]
        noise = float((theirs(ids).logits[0].double() - logits).abs().max())
        rows = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        expected = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        worst = float((torch.tensor(logprobs_of(events, key), dtype=torch.float64) - expected).abs().max())
        assert worst <= 2 * TIMES_NOISE * noise, f"request {key}: {worst:.2e} beyond {2 * TIMES_NOISE * noise:.2e}"
