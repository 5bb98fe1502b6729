"""The engine as a library."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, GenerationError, Sampling, StartError
from engine.llm import in_python
from engine.messages import Event, Inbound
from server.config import ServerConfig

DEMO = Path(__file__).parents[2] / "demo/checkpoint"
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


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("one text", r"generate\(\[text\]\)"),
        (7, r"generate\(\[text\]\)"),
        ([7], "a prompt must be text or a list of token ids; found 7"),
        ([b"bytes"], "found b'bytes'"),
        ([["a"]], r"found \['a'\]"),
        ([[1.5]], r"found \[1.5\]"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(llm: LLM, prompts: Any, words: str) -> None:
    """Bug: a text taken for a list of letters, 1.5 for a token."""
    with pytest.raises(TypeError, match=words):
        llm.generate(prompts, Sampling(max_tokens=1))


def test_what_is_no_sampling_and_no_conversation_is_refused(llm: LLM) -> None:
    with pytest.raises(TypeError, match=r"sampling must be a Sampling; found {'max_tokens': 1}"):
        llm.generate(["a"], {"max_tokens": 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"chat\(\[messages\]\)"):
        llm.chat([{"role": "user", "content": "Hi"}])  # type: ignore[list-item]


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
    assert "".join(llm.stream("Once upon a time", Sampling(max_tokens=8, temperature=0))) == answer.text
    assert len(llm.generate([[5, 6, 7]])[0].token_ids) <= 125, "more than the default fits in 128 tokens"
    llm._tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: use generate"):
        llm.chat([[{"role": "user", "content": "Hi"}]])


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"kv_memry": 1}, TypeError, "LLM has no setting 'kv_memry'; it has device, .*kv_memory"),
        ({"kv_memory": "4GiB"}, ValueError, "kv_memory must be int >= 1"),
        ({"kv_memory": 100}, StartError, r"^kv_memory 100 B holds no page: raise it to .* KiB or more$"),
        ({"max_model_len": 10**6}, StartError, "^max_model_len 1000000 exceeds"),
        ({"kv_policy": "k4v4", "kv_calibration": Path("x")}, StartError, "and kv_calibration names x: leave it out"),
        ({"model": "no/such-model", "offline": True}, ValueError, "run once without offline to fetch it"),
        ({"model": 5}, ValueError, "model must be str; found 5"),
    ],
)
def test_errors_name_settings_as_they_are_written_here(
    tiny_checkpoint: Path, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    """Bug: advice to use --kv-memory given to a program, or settings taken for others and ignored."""
    with pytest.raises(kind, match=words):
        LLM(**{"model": tiny_checkpoint} | settings)


def test_flags_that_the_engine_names_exist() -> None:
    """Bug: advice to use an option that was renamed, or an argument that LLM does not have."""
    engine = Path(__file__).parents[2] / "engine"
    text = "\n".join(path.read_text() for path in engine.rglob("*.py") if path.parent.name != "conversion")
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))
    of_calibrate = {"tokens", "out"}
    assert "kv-memory" in named
    assert {name.replace("-", "_") for name in named - of_calibrate} <= set(ServerConfig.model_fields)
    for name in named - of_calibrate:
        assert "--" not in in_python(f"--{name}")


def test_flags_of_other_programs_stay() -> None:
    message = "raise --kv-memory, or use --kv f16; see --help"
    assert in_python(message) == "raise kv_memory, or use kv_policy f16; see --help"


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=40, seed=3, ignore_eos=True), Sampling(60, seed=5)])
def test_a_stream_is_the_answer_in_pieces(llm: LLM, sampling: Sampling) -> None:
    """Bug: halves of characters shown, the end token's text added, or the last bytes lost."""
    (answer,) = llm.generate(["Once"], sampling)
    pieces = list(llm.stream("Once", sampling))
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1
    assert all(pieces)


def test_a_stream_that_is_left_frees_the_engine(llm: LLM) -> None:
    """Bug: a stream nobody reads takes its share of every later batch; or two calls steal each other's tokens."""
    sampling = Sampling(max_tokens=50, ignore_eos=True, temperature=0)
    stream = llm.stream([1, 2], sampling)
    next(stream)
    with pytest.raises(GenerationError, match=r"still streams an answer: .* close\(\) it"):
        llm.generate(["a"])
    del stream
    assert len(llm.generate(["a"], sampling)[0].token_ids) == 50
    assert not llm._core.has_work


def test_log_probabilities_belong_to_the_tokens(llm: LLM) -> None:
    """Bug: asked for and not given (prompt), or one more than there are tokens (the token that stopped it)."""
    (free,) = llm.generate([[5, 6, 7]], Sampling(max_tokens=9, temperature=0, ignore_eos=True))
    stop = free.token_ids[4]
    length = free.token_ids.index(stop)
    rules = Sampling(9, temperature=0, stop_token_ids=(stop,), num_logprobs=2, num_prompt_logprobs=1)
    (answer,) = llm.generate([[5, 6, 7]], rules)
    assert answer.finish_reason == "stop"
    assert [entry.token for entry in answer.logprobs] == answer.token_ids == free.token_ids[:length]
    assert all(len(entry.top) == 2 for entry in answer.logprobs)
    assert [entry.token for entry in answer.prompt_logprobs] == [6, 7]


def test_more_precision_for_a_call_that_asks(tiny_checkpoint: Path) -> None:
    """Bug: kv_request_window is a setting, and no call can make use of it."""
    llm = LLM(tiny_checkpoint, kv_policy="k4v4:w32", kv_request_window=64, kv_memory=16 << 20)
    sampling = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
    assert len(llm.generate(["a"], sampling, kv_policy="f16")[0].token_ids) == 4
    with pytest.raises(GenerationError, match=r"\(kv_request_window\): lower max_tokens"):
        llm.generate([[1] * 90], sampling, kv_policy="f16")
    for asked, words in (
        ("k4v4:w8", "window of 8 is shorter than the KV cache's own 32"),
        ("k8v4", "differs from the KV"),
    ):
        with pytest.raises(GenerationError, match=words):  # no server has a part in this
            llm.generate(["a"], sampling, kv_policy=asked)


def test_conversations_are_written_by_the_template() -> None:
    """Bug: markup added twice, or the answer's turn not opened."""
    llm = LLM(DEMO, kv_memory=8 << 20)
    messages = [{"role": "user", "content": "Hi"}]
    prompt, closed = llm.chat_prompt(messages), llm.chat_prompt(messages, add_generation_prompt=False)
    text = llm._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert llm._tokenizer.decode(prompt) == text
    assert closed == prompt[: len(closed)]
    assert len(closed) < len(prompt)
    sampling = Sampling(max_tokens=5, temperature=0)
    assert llm.chat([messages, messages], sampling)[1] == llm.generate([prompt], sampling)[0]
    continued = llm.chat_prompt([*messages, {"role": "assistant", "content": "Once"}], continue_final_message=True)
    assert llm._tokenizer.decode(continued) == f"{text}Once"
    with pytest.raises(TypeError, match="no variable 'bogus'"):
        llm.chat_prompt(messages, bogus=1)
    with pytest.raises(ValueError, match=r"messages\[0\] has no 'content'"):
        llm.chat([[{"role": "user"}]])
    with pytest.raises(ValueError, match="a message has 'name', which this model's chat template does not read"):
        llm.chat([[messages[0] | {"name": "Ann"}]])  # it reads those of tools
    llm._tokenizer.chat_template = "{{ raise_exception('users first') }}"
    with pytest.raises(ValueError, match="the chat template refused the messages: users first"):
        llm.chat([messages])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "tokenizer.json",
            None,
            r"copy has no tokenizer: put the model's tokenizer.json \(or tokenizer.model\) there$",
        ),
        (
            "tokenizer.json",
            "{",
            r"the tokenizer in .*/copy/tokenizer.json cannot be read \(.*\): put the model's own in",
        ),
        ("tokenizer.json", "{}", r"the tokenizer in .*/copy cannot be read \(.*\): put the model's own in its place$"),
        ("tokenizer_config.json", "{", r"the tokenizer in .*/copy/tokenizer_config.json cannot be read \(.*\): put"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str | None, words: str
) -> None:
    """Bug: a library's page of guesses, a JSON error that names no file, or either after minutes of weights."""
    monkeypatch.setattr("engine.llm.build", pytest.fail)
    copy = shutil.copytree(DEMO, tmp_path / "copy")
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(StartError, match=words) as caught:
        LLM(copy, kv_memory=8 << 20)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_called_that(tmp_path: Path) -> None:
    """Bug: an empty folder is answered with advice about tokenizers."""
    with pytest.raises(StartError, match=r"is not a model folder: it has no config\.json"):
        LLM(tmp_path)
