"""The tokenizer that a GGUF file carries, rebuilt for the tokenizers library so that it gives llama.cpp's ids.

Two kinds cover the models that are served:

    gpt2     byte-level BPE with merges; tokenizer.ggml.pre names how a text is first cut into words
    llama    SentencePiece: pairs merge to the piece with the highest score; spaces are "▁", other bytes "<0x0A>"

What llama.cpp does not do is left out, also where a model's own tokenizer.json does it: Unicode normalization.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.checkpoint.errors import FilesError, FormatRefused
from engine.checkpoint.gguf_file import Settings, read_headers

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
PREFIX = "tokenizer.ggml"
METASPACE = "▁"

# Ways to cut a text into words, each pattern within the pieces of the one before. Facts from ggml-org/llama.cpp,
# src/llama-vocab.cpp.
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+{0}"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*{0}"
)


def _words(letters: str, digits: str) -> str:
    """Llama 3's pattern and its relatives."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


LLAMA3 = (_words(r"\p{L}+", r"\p{N}{1,3}"),)
QWEN2 = (_words(r"\p{L}+", r"\p{N}"),)
GPT2 = (_GPT2,)
STARCODER = (r"\p{N}", _GPT2)
TEKKEN = (_CASED.replace("{0}", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",)
GPT4O = (_CASED.replace("{0}", f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",)
WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), LLAMA3)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), QWEN2)
    | dict.fromkeys(("gpt-2", "olmo", "mpt", "exaone4"), GPT2)
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), STARCODER)
    | {"tekken": TEKKEN, "gpt-4o": GPT4O, "llama4": GPT4O}
)
WHOLE_WORDS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
)  # a word that is a token is not merged
BEGIN_BY_DEFAULT = WHOLE_WORDS


def read_gguf_tokenizer(path: Path) -> tuple[Any, str | None]:
    """The file's tokenizer, as transformers holds one, and its chat template. Raises CheckpointError."""
    from transformers import PreTrainedTokenizerFast  # imports no torch

    settings = read_headers(path)[0].settings
    kind = settings.text(f"{PREFIX}.model", "none")
    if kind not in ("gpt2", "llama"):
        raise FormatRefused(f"{path}: tokenizer.ggml.model is {kind!r}; supported are 'gpt2' and 'llama'")
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(settings.array(f"{PREFIX}.tokens", str))]
    vocabulary = {text: token for token, text in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise FilesError(f"{path}: {len(tokens) - len(vocabulary)} tokens of the vocabulary are there twice")
    core = _byte_level(settings, vocabulary) if kind == "gpt2" else _sentencepiece(settings, tokens, vocabulary)
    _add_markup(core, settings, tokens)
    first = {"bos": 1, "eos": 2} if kind == "llama" else {"bos": -1, "eos": -1}  # SentencePiece's own
    begin, end = (_named(settings, name, tokens, first[name]) for name in ("bos", "eos"))
    _add_ends(core, settings, vocabulary, (begin, end))
    template = settings.text("tokenizer.chat_template", "")
    hub: Any = PreTrainedTokenizerFast
    return hub(tokenizer_object=core, bos_token=begin, eos_token=end), template or None


def _byte_level(settings: Settings, vocabulary: Mapping[str, int]) -> Tokenizer:
    pre = settings.text(f"{PREFIX}.pre", "")
    if pre not in WORDS:
        raise FormatRefused(
            f"tokenizer.ggml.pre is {pre!r}; supported are {', '.join(WORDS)}. Without the right one a text "
            "would be cut into other tokens than in training"
        )
    merges = [_pair(merge) for merge in settings.array(f"{PREFIX}.merges", str)]
    core = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges, ignore_merges=pre in WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORDS[pre]]
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    return core


def _pair(merge: str) -> tuple[str, str]:
    """ "Ġ a" is the pair of "Ġ" and "a"; the first piece may begin with a space."""
    middle = merge.find(" ", 1)
    if middle < 0:
        raise FilesError(f"tokenizer.ggml.merges holds {merge!r}, which is no pair")
    return merge[:middle], merge[middle + 1 :]


def _sentencepiece(settings: Settings, tokens: Sequence[str], vocabulary: Mapping[str, int]) -> Tokenizer:
    scores = settings.array(f"{PREFIX}.scores", float)
    if len(scores) != len(tokens):
        raise FilesError(f"tokenizer.ggml.scores are {len(scores)} for {len(tokens)} tokens")
    unknown = settings.integer(f"{PREFIX}.unknown_token_id", 0)
    prefix = settings.flag(f"{PREFIX}.add_space_prefix", True)
    core = Tokenizer(
        models.BPE(
            vocab=dict(vocabulary),
            merges=_merges(tokens, scores, vocabulary),
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", METASPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core


def _merges(tokens: Sequence[str], scores: Sequence[float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that make a piece, the highest score first: SentencePiece's rule as a list of merges."""
    ranked = sorted(range(len(tokens)), key=lambda token: -scores[token])  # stable: of equal ones the first
    return [
        (piece[:i], piece[i:])
        for piece in map(tokens.__getitem__, ranked)
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]


def _add_markup(core: Tokenizer, settings: Settings, tokens: Sequence[str]) -> None:
    """Tokens that are found in a text before anything else is done to it."""
    types = settings.array(f"{PREFIX}.token_type", int) if f"{PREFIX}.token_type" in settings else []
    for special in (True, False):
        kinds = (UNKNOWN, CONTROL) if special else (USER_DEFINED,)
        found = [
            AddedToken(text, special=special, normalized=False)
            for text, kind in zip(tokens, types, strict=False)
            if kind in kinds
        ]
        (core.add_special_tokens if special else core.add_tokens)(found)


def _named(settings: Settings, name: str, tokens: Sequence[str], default: int) -> str | None:
    token = settings.integer(f"{PREFIX}.{name}_token_id", default)
    return tokens[token] if 0 <= token < len(tokens) else None


def _add_ends(
    core: Tokenizer, settings: Settings, vocabulary: Mapping[str, int], ends: tuple[str | None, str | None]
) -> None:
    """BOS before a text and EOS behind it, where the file says so; llama.cpp's defaults where it says nothing."""
    by_default = settings.text(f"{PREFIX}.model") == "llama" or settings.text(f"{PREFIX}.pre", "") in BEGIN_BY_DEFAULT
    begin = ends[0] if settings.flag(f"{PREFIX}.add_bos_token", by_default) else None
    end = ends[1] if settings.flag(f"{PREFIX}.add_eos_token", False) else None
    if begin is None and end is None:
        return
    named = [(text, vocabulary[text]) for text in {begin, end} if text is not None]
    around = [text for text in (begin, "$A", end) if text is not None]
    core.post_processor = processors.TemplateProcessing(single=around, pair=[*around, "$B"], special_tokens=named)
