"""A request's tokens and log-probabilities are the same to the last bit whatever the engine does beside it."""

from pathlib import Path

import pytest
import torch

from engine.assembly import build
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Event, Inbound, Token
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import variants
from tests.engine.worlds import run, submit

FIXTURES = Path(__file__).parent.parent / "fixtures"
PROMPT = [i * 7 % 90 for i in range(40)]


@pytest.fixture(scope="module", params=["llama-tied", "qwen3", "gptq-v1-4bit-asym-actorder"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (FIXTURES / request.param).is_dir():
        return FIXTURES / str(request.param)
    made = tmp_path_factory.mktemp(request.param)
    write_checkpoint(made, variants()[request.param])
    return made


def core_of(folder: Path, num_pages: int = 40, max_batch_tokens: int = 64) -> EngineCore:
    """An engine over float16 pages of 16 tokens."""
    _, plan = build(EngineConfig(str(folder), kv_memory=1 << 22))
    page_bytes = 16 * plan.kv_bytes_per_token
    config = EngineConfig(
        str(folder),
        page_size=16,
        kv_memory=num_pages * page_bytes,
        max_num_seqs=8,
        max_batch_tokens=max_batch_tokens,
        max_model_len=64,
    )
    return build(config)[0]


def answer(events: list[Event]) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
    """Tokens with their exact log-probabilities."""
    found = [e for e in events if isinstance(e, Token) and e.id == "it"]
    return [(e.token, e.logprobs.logprob, tuple(e.logprobs.top)) for e in found if e.logprobs]


REQUEST = submit("it", PROMPT, max_tokens=24, temperature=1.0, seed=5, num_logprobs=5, ignore_eos=True)


def crowd(count: int) -> list[Inbound]:
    return [
        submit(f"{i}", [i + 1] * (5 * i + 3), max_tokens=30, temperature=1.0, ignore_eos=True) for i in range(count)
    ]


def test_batch_chunks_hits_preemption_and_threads_change_no_bit(folder: Path) -> None:
    """Bug: a sum whose order depends on how many rows share the step; at temperature 1 it changes seeded answers."""
    alone = answer(run(core_of(folder), [REQUEST]))
    assert len(alone) == 24
    assert answer(run(core_of(folder), [*crowd(6), REQUEST])) == alone, "in a crowd"
    for chunk in (9, 17, 33):
        assert answer(run(core_of(folder, max_batch_tokens=chunk), [REQUEST])) == alone, f"in chunks of {chunk}"
    warm = core_of(folder)
    run(warm, [submit("before", [*PROMPT, 1], max_tokens=1)])
    assert answer(run(warm, [REQUEST])) == alone, "after a prefix hit"
    assert warm.stats().prefix_hits_total > 0
    tight = core_of(folder, num_pages=7, max_batch_tokens=20)
    assert answer(run(tight, [*crowd(4), submit("late", PROMPT[:30], max_tokens=34, priority=-1), REQUEST])) == alone
    assert tight.stats().preemptions_total > 0


def test_choices_equal_those_of_a_request_of_one(folder: Path) -> None:
    """Bug: the choices of a fork read rows that their leader would have computed differently."""
    many = submit("it", PROMPT, n=3, max_tokens=12, temperature=1.0, seed=5, num_logprobs=5, ignore_eos=True)
    one = submit("it", PROMPT, n=1, max_tokens=12, temperature=1.0, seed=5, num_logprobs=5, ignore_eos=True)
    events = run(core_of(folder), [many])
    first = [event for event in events if not isinstance(event, Token) or event.index == 0]
    assert answer(first) == answer(run(core_of(folder), [one]))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_number_of_threads_changes_no_bit(folder: Path, num_threads: int) -> None:
    expected = answer(run(core_of(folder), [REQUEST]))
    core = core_of(folder)
    torch.set_num_threads(num_threads)
    try:
        assert answer(run(core, [REQUEST])) == expected
    finally:
        torch.set_num_threads(1)
