"""Ids to text, one token at a time, for the two ways checkpoints write bytes."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from server.tokenizer import Detokenizer, HubTokenizer, TemplateError, TokenizerError, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
CORPUS = [
    "the quick brown fox",
    "there once was a fox",
    "ünïcödé häppens",
    "日本語 テキスト",
    "🎉🎉 party 👩‍👩‍👧",
    "  spaces   here",
]
SPECIALS = ["<s>", "</s>", "<end of text>"]


def byte_level() -> HubTokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens(SPECIALS)
    core.add_tokens([AddedToken("<think>")])
    return hub(core)


def llama_like() -> HubTokenizer:
    """Merges over "▁", 256 byte tokens, a decoder that strips the first space: Llama 2's."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(
        CORPUS[:3] * 4,
        trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False),
    )
    vocab = core.get_vocab(with_added_tokens=False)
    merges = [(left, right) for left, right in json.loads(core.to_str())["model"]["merges"]]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return hub(core)


def hub(core: Tokenizer) -> HubTokenizer:
    return HubTokenizer(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>"))  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module", params=["byte level", "llama", "minimind", "stories260K"])
def tokenizer(request: pytest.FixtureRequest) -> HubTokenizer:
    if request.param == "byte level":
        return byte_level()
    if request.param == "llama":
        return llama_like()
    folder = SHARED / {"minimind": "data/tokenizers/minimind", "stories260K": "models/stories260K"}[request.param]
    if not folder.is_dir():
        pytest.skip("needs the tokenizer files next to the repository")
    return load_tokenizer(folder)


def increments(tokenizer: HubTokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [], skip_special_tokens=True)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def reference(tokenizer: HubTokenizer, ids: list[int]) -> str:
    """What the tokenizers library makes of all ids at once."""
    return str(tokenizer._core.decode(ids, skip_special_tokens=True))


@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.sampled_from(CORPUS))
def test_increments_add_up_to_the_whole_text(tokenizer: HubTokenizer, text: str) -> None:
    """Bug: characters split over tokens, byte tokens or leading spaces come out differently in a stream."""
    ids = tokenizer.encode(text)
    assert "".join(increments(tokenizer, ids)) == reference(tokenizer, ids)


@settings(max_examples=100, deadline=None)
@given(text=st.sampled_from(CORPUS), cut=st.integers(1, 12))
def test_an_answer_continues_its_prompt(tokenizer: HubTokenizer, text: str, cut: int) -> None:
    """Bug: the space between prompt and answer is dropped because the answer is decoded on its own."""
    ids = tokenizer.encode(text)
    whole = reference(tokenizer, ids)
    head = increments(tokenizer, ids[:cut])
    head_text = "".join(head[:-1])  # without what an incomplete character leaves
    if head[-1] == "":
        assert head_text + "".join(increments(tokenizer, ids[cut:], ids[:cut])) == whole


@pytest.fixture(scope="module")
def byte_tokens() -> HubTokenizer:
    return byte_level()


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=20))
def test_any_ids_of_a_byte_level_vocabulary_decode_like_the_library(byte_tokens: HubTokenizer, ids: list[int]) -> None:
    """Bug: a model that emits broken UTF-8 shows other replacement characters in a stream than without one."""
    assert "".join(increments(byte_tokens, ids)) == reference(byte_tokens, ids)


def test_incomplete_characters_are_held_until_complete() -> None:
    """Bug: an emoji of four byte tokens is streamed as four replacement characters."""
    tokenizer = llama_like()
    ids = [tokenizer._core.token_to_id(f"<0x{byte:02X}>") for byte in "🎉".encode()]
    assert increments(tokenizer, ids) == ["", "", "", "🎉", ""]
    assert increments(tokenizer, ids[:3]) == ["", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_endless_broken_bytes_cost_the_same_per_token() -> None:
    """Bug: a window that waits for valid text grows with every broken token, and a stream becomes quadratic."""
    tokenizer = llama_like()
    detokenizer = Detokenizer(tokenizer)
    token = tokenizer._core.token_to_id("<0xFF>")
    assert "".join(detokenizer.push(token) for _ in range(50_000)) == "\N{REPLACEMENT CHARACTER}" * 50_000


def test_special_tokens_are_left_out_or_shown() -> None:
    tokenizer = byte_level()
    ids = [tokenizer._core.token_to_id(token) for token in ("<s>", "<think>", "<end of text>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>"
    assert tokenizer.decode(ids) == "<s><think><end of text>"
    assert tokenizer.token_bytes(10**6) == b""  # vocabularies are padded; such an id stands for nothing


def test_bos_is_added_once() -> None:
    """Bug: a prompt that brings its own BOS gets two, which models were never trained on."""
    tokenizer = llama_like()
    bos = tokenizer._core.token_to_id("<s>")
    assert tokenizer.encode("the fox").count(bos) == 1
    assert tokenizer.encode("<s>the fox").count(bos) == 1
    assert bos not in tokenizer.encode("the fox", add_special_tokens=False)


@pytest.mark.parametrize("make", [byte_level, llama_like])
def test_no_token_is_longer_than_the_longest(make: Callable[[], HubTokenizer]) -> None:
    """Bug: a prompt that fits is refused, because its tokens are longer than was thought."""
    tokenizer = make()
    ids = range(len(tokenizer._hub))
    assert max(len(tokenizer.token_bytes(token)) for token in ids) <= tokenizer.max_token_bytes


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    """Bug: the tokenizers library holds the interpreter lock in `encode`, and every other answer stands still."""
    tokenizer, ticks, done = byte_level(), 0, threading.Event()

    def work() -> None:
        tokenizer.encode("the quick brown fox " * 50_000)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks >= 20  # with the lock held it is one or two


def test_unknown_decoders_are_refused_by_name(tmp_path: Path) -> None:
    """Bug: text that is almost right."""
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        hub(core)
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_folder_with_template_file_renders(tmp_path: Path) -> None:
    byte_level()._hub.save_pretrained(tmp_path)
    assert not load_tokenizer(tmp_path).has_chat_template
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ raise_exception('no way') if bad }}")
    tokenizer = load_tokenizer(tmp_path, template)
    assert tokenizer.render([{"role": "user", "content": "x"}]) == "[x]"
    assert tokenizer.template_variables >= {"messages", "bad"}
    assert not tokenizer.template_variables & {"content", "way"}
    with pytest.raises(TemplateError, match="no way"):
        tokenizer.render([{"role": "user", "content": "x"}], bad=True)
    with pytest.raises(TokenizerError, match=r"^--chat-template \S+missing\.jinja cannot be read: No such file"):
        load_tokenizer(tmp_path, tmp_path / "missing.jinja")


BROKEN = "{% for m in messages %}\n{{ m.content }}\n{% endfo %}"


def test_a_template_that_is_not_jinja_is_found_at_load(tmp_path: Path) -> None:
    """Bug: the server starts, and every conversation is answered with 400 as if its caller had made the mistake."""
    made, file = byte_level(), tmp_path / "template.jinja"
    made._hub.chat_template = BROKEN
    made._hub.save_pretrained(tmp_path)
    own = tmp_path / "chat_template.jinja"
    with pytest.raises(TokenizerError, match=rf"^{own}: the chat template is not Jinja, line 3: .*endfo.*--chat-templ"):
        load_tokenizer(tmp_path)
    file.write_text("{{ messages[0].content }}")
    assert load_tokenizer(tmp_path, file).render([{"role": "user", "content": "x"}]) == "x"
    file.write_text("{{ messages | no_such_filter }}")
    with pytest.raises(TokenizerError, match=rf"^--chat-template {file}: .* line 1: No filter named 'no_such_filter'"):
        load_tokenizer(tmp_path, file)
    file.write_text("\n")
    with pytest.raises(TokenizerError, match=rf"^--chat-template {file} is empty"):
        load_tokenizer(tmp_path, file)
    own.unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": BROKEN}))
    with pytest.raises(TokenizerError, match=rf"^{tmp_path}/tokenizer_config\.json, chat_template: .* line 3: "):
        load_tokenizer(tmp_path)


def test_a_file_that_is_no_template_is_not_taken_for_one(tmp_path: Path) -> None:
    """Bug: --chat-template with the name of another text: each conversation is answered as if that had been asked."""
    byte_level()._hub.save_pretrained(tmp_path)
    file = tmp_path / "notes.txt"
    file.write_text("{# messages #} Buy milk. {{ bos_token }}")
    with pytest.raises(TokenizerError, match="never reads messages"):
        load_tokenizer(tmp_path, file)


def test_a_template_may_refuse_a_conversation(tmp_path: Path) -> None:
    """Bug: a template that insists on a system message, or on tools, taken for one that cannot be used."""
    byte_level()._hub.save_pretrained(tmp_path)
    file = tmp_path / "template.jinja"
    file.write_text("{{ raise_exception('a system message first') if messages[0].role != 'system' }}ok")
    tokenizer = load_tokenizer(tmp_path, file)
    assert tokenizer.render([{"role": "system", "content": "x"}]) == "ok"
    with pytest.raises(TemplateError, match="a system message first"):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    """Bug: 400 for every conversation, with advice on an argument of another library."""
    made = byte_level()
    made._hub.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(TokenizerError, match=r"\(tool_use, rag\) is called default: choose one with --chat-template"):
        made.check_template()
    made._hub.chat_template = {"default": "{{ messages }}", "rag": "y"}
    made.check_template()


def test_missing_tokenizer_is_called_that(tmp_path: Path) -> None:
    """Bug: a half-copied folder is answered with advice to install libraries."""
    with pytest.raises(TokenizerError, match=rf"{tmp_path} has no tokenizer: .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_templates_cannot_reach_python(tmp_path: Path) -> None:
    """Bug: a downloaded template runs code on the server."""
    tokenizer = byte_level()
    tokenizer._hub.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TemplateError, match="unsafe"):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_templates_in_use_render_or_refuse_in_words() -> None:
    """Bug: a template that asks for something unusual (dates, loop controls, namespaces) breaks the server."""
    folder, texts = SHARED / "data/chat_templates", []
    if not folder.is_dir():
        pytest.skip("needs the chat templates next to the repository")
    tokenizer = byte_level()
    for path in sorted(folder.glob("*.jinja")):
        tokenizer._hub.chat_template = path.read_text(encoding="utf-8")
        try:
            messages = [{"role": "user", "content": "How are you?"}]
            texts.append(tokenizer.render(messages, add_generation_prompt=True, continue_final_message=False))
        except TemplateError:  # a few insist on tools
            continue
    assert all("How are you?" in text for text in texts)
    assert len(texts) > 40


def test_truncation_and_padding_of_the_training_run_are_switched_off() -> None:
    """Bug: tokenizer.json that still says "8 tokens at most" cuts every prompt, in silence."""
    made = byte_level()
    made._core.enable_truncation(4)
    made._core.enable_padding(length=32)
    text = "the quick brown fox jumps"
    again = HubTokenizer(made._hub)
    assert again.decode(again.encode(text)) == text


def test_added_tokens_are_text_as_they_stand() -> None:
    """Bug: an added token of letters that also stand for bytes ("é¡") comes out as broken bytes."""
    core = byte_level()._core
    core.add_tokens([AddedToken("é¡")])
    tokenizer = hub(core)
    assert tokenizer.decode(tokenizer.encode("a é¡ b")) == "a é¡ b"


@pytest.mark.parametrize("content", ["{}", '{"model": 3}', "[]", "nonsense"])
def test_a_damaged_file_is_an_error_that_names_the_folder(content: str, tmp_path: Path) -> None:
    """Bug: a traceback from inside a library."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
