"""Tokenizers of GGUF files: the ids are llama.cpp's."""

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import gguf_tokenizer
from engine.checkpoint.gguf_tokenizer import read_gguf_tokenizer
from server.tokenizer import TokenizerError, load_tokenizer

FOLDER = Path(__file__).parents[1] / "fixtures" / "gguf"
BPE, STORIES = FOLDER / "bpe.gguf", FOLDER / "stories260k.gguf"


@cache
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())["tokens"]
    return found


def renamed(tmp_path: Path, old: str, new: str) -> Path:
    """bpe.gguf with one string of its settings replaced by another."""
    before, after = (struct.pack("<Q", len(word)) + word.encode() for word in (old, new))
    data = BPE.read_bytes()
    assert data.count(before) == 1
    path = tmp_path / "model.gguf"
    path.write_bytes(data.replace(before, after))
    return path


@pytest.mark.parametrize("words", [name for name in expected() if name not in ("texts", "spm")])
def test_byte_level_ids_are_those_of_llama_cpp(words: str, tmp_path: Path) -> None:
    """Bug: words cut at other places than in training; a model reads them all the same, worse."""
    hub, _ = read_gguf_tokenizer(BPE if words == "qwen2" else renamed(tmp_path, "qwen2", words))
    for text, ids in zip(expected()["texts"], expected()[words], strict=True):
        assert hub.backend_tokenizer.encode(text).ids == ids, text


def test_sentencepiece_ids_are_those_of_llama_cpp() -> None:
    """Bug: another order of merges, a missing first space, bytes that are not found, BOS left out."""
    hub, _ = read_gguf_tokenizer(STORIES)
    for text, ids in zip(expected()["texts"], expected()["spm"], strict=True):
        assert hub.backend_tokenizer.encode(text).ids == ids, text


@pytest.mark.parametrize("path", [BPE, STORIES], ids=["byte level", "SentencePiece"])
def test_texts_come_back(path: Path) -> None:
    """The file's pieces must also say which bytes they are: both ways of writing bytes, and markup."""
    tokenizer = load_tokenizer(path)
    for text in expected()["texts"]:
        if path == STORIES and "</s>" in text:
            continue  # what follows markup gets a first space of its own
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


def test_markup_is_one_token_and_is_not_shown() -> None:
    tokenizer = load_tokenizer(BPE)
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert tokenizer.token_bytes(ids[0]) == b"<|im_start|>"
    assert tokenizer.is_special(ids[0])
    assert tokenizer.is_special(ids[-1])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi"


def test_the_files_chat_template_is_used(tmp_path: Path) -> None:
    """Its special tokens are those that the settings name by id; a template given to the server goes before it."""
    messages = [{"role": "user", "content": "Once"}, {"role": "user", "content": "upon"}]
    assert load_tokenizer(STORIES).render(messages) == "<s>Once upon "
    assert not load_tokenizer(BPE).has_chat_template
    given = tmp_path / "template.jinja"
    given.write_text("{{ messages[0].content }}!")
    assert load_tokenizer(STORIES, given).render(messages) == "Once!"


def test_what_is_not_served_is_named(tmp_path: Path) -> None:
    """Another way to cut words must not be guessed."""
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.pre is 'kimi-k2'; supported are llama3"):
        load_tokenizer(renamed(tmp_path, "qwen2", "kimi-k2"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.model is 'bert'; supported are 'gpt2' and 'llama'"):
        load_tokenizer(renamed(tmp_path, "gpt2", "bert"))
    with pytest.raises(TokenizerError, match=r"'no_vocab'"):
        load_tokenizer(FOLDER / "types.gguf")


def test_every_word_rule_was_compared() -> None:
    """A rule without a fixture would be read on trust."""
    compared = {gguf_tokenizer.WORDS[name] for name in expected() if name in gguf_tokenizer.WORDS}
    assert set(gguf_tokenizer.WORDS.values()) == compared
