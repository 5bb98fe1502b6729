"""The engine as a library."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine import LLM, GenerationError, Sampling
from engine.messages import Event, Inbound

STORIES = Path(__file__).parents[1] / "fixtures/gguf/stories260k.gguf"


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return LLM(str(tiny_checkpoint), kv_memory=4 << 20)


def test_answers_come_in_order_and_equal_those_of_single_calls(llm: LLM) -> None:
    """Bug: answers of a batch handed to the wrong prompts."""
    prompts: list[str | list[int]] = ["one", "two and more", [65, 66, 67]]
    sampling = Sampling(max_tokens=6, temperature=0)
    together = llm.generate(prompts, sampling)
    assert [llm.generate([prompt], sampling)[0].token_ids for prompt in prompts] == [a.token_ids for a in together]
    assert all(answer.finish_reason in ("length", "stop") for answer in together)


def test_an_interrupted_call_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: after Ctrl-C the next call is handed the tokens of the one before."""
    steps = iter([None, KeyboardInterrupt])
    original = llm._core.step

    def step(inbox: Sequence[Inbound]) -> list[Event]:
        if error := next(steps, None):
            raise error
        return original(inbox)

    monkeypatch.setattr(llm._core, "step", step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"], Sampling(max_tokens=50, ignore_eos=True))
    assert len(llm.generate(["b"], Sampling(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_single_text_is_not_taken_for_a_list_of_letters(llm: LLM) -> None:
    with pytest.raises(TypeError, match=r"generate\(\[text\]\)"):
        llm.generate("one text", Sampling(max_tokens=1))


def test_what_never_fits_is_an_error_and_the_engine_lives_on(llm: LLM) -> None:
    """Bug: the rest of a refused batch keeps running and holding pages."""
    with pytest.raises(GenerationError, match="exceed"):
        llm.generate(["a", [1] * 5000], Sampling(max_tokens=6))
    assert len(llm.generate(["a"], Sampling(max_tokens=6, ignore_eos=True))[0].token_ids) == 6


def test_a_gguf_file_brings_its_tokenizer() -> None:
    """Bug: refused, or a tokenizer looked for in the file's folder."""
    llm = LLM(str(STORIES), kv_memory=4 << 20, max_num_seqs=2)
    (answer,) = llm.generate(["Once upon a time"], Sampling(max_tokens=8, temperature=0))
    assert answer.text.startswith(", there was a")
    assert llm.plan.model == str(STORIES)
