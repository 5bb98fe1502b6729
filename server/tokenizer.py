"""Text to ids, and ids back to text one token at a time.

Every token is a run of bytes (`token_bytes`), so text comes back exactly: the bytes of the tokens are fed to an
incremental UTF-8 decoder, which waits for the rest of a character that is split over tokens. No token is looked at
twice, and nothing half-decoded is ever shown.

Two ways of writing bytes as tokens cover the checkpoints in use; a third is refused at load, by name:

    byte level      each byte is a printable character ("Ġ" is 0x20)         GPT-2, Llama 3, Qwen, DeepSeek ...
    SentencePiece   "▁" is a space, "<0xE2>" is a byte, the first space of    Llama 2, Mistral, Gemma ...
                    a text is an artefact and dropped
"""

import codecs
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2

from engine.client import GGUF, TOKENIZER_FILES, file_tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
METASPACE = "▁"


class TokenizerError(ValueError):
    """The tokenizer of a checkpoint cannot be used; the message says why."""


class TemplateError(ValueError):
    """The chat template refused the messages; the message is the template's own."""


class Tokenizer(Protocol):
    """What the server needs of a tokenizer."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens (BOS) as the checkpoint says, and BOS never twice."""
        ...

    @property
    def max_token_bytes(self) -> int:
        """Bytes of the longest token: a text of more than that times n is more than n tokens."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The whole text of `ids`. Incomplete characters become U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; empty for an id the vocabulary does not use."""
        ...

    def is_special(self, token: int) -> bool:
        """Whether `token` is markup such as BOS, which answers leave out."""
        ...

    @property
    def drops_first_space(self) -> bool:
        """Whether the space in front of a text's first token is an artefact."""
        ...

    @property
    def template_variables(self) -> frozenset[str]:
        """The names the chat template's code reads; it cannot know others."""
        ...

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Messages as one prompt text, special tokens included. Raises TemplateError."""
        ...


class Detokenizer:
    """Token ids of one answer to text, as they come. `prompt` is what the answer continues."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.drops_first_space and not any(map(self._is_shown, prompt))

    def push(self, token: int) -> str:
        """The text this token completes; empty while a character is incomplete."""
        if not self._is_shown(token):
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._at_start:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for bytes that never became a character."""
        return self._decoder.decode(b"", final=True)

    def _is_shown(self, token: int) -> bool:
        return not (self._skip_special and self._tokenizer.is_special(token))


def detokenize(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    detokenizer = Detokenizer(tokenizer, (), skip_special_tokens)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


class HubTokenizer:
    """The tokenizer of a checkpoint folder, read by transformers."""

    def __init__(self, backend: Any, chat_template: str | None = None) -> None:
        """`backend` is a transformers tokenizer with a `tokenizers` core. Raises TokenizerError for other kinds."""
        core: Any = getattr(backend, "backend_tokenizer", None)
        if core is None:
            raise TokenizerError(f"{type(backend).__name__} is not backed by the tokenizers library")
        core.no_truncation()  # some files carry the settings of the training run
        core.no_padding()
        self._hub = backend
        self._core = core
        if chat_template is not None:
            backend.chat_template = chat_template
        decoder = json.loads(core.to_str())["decoder"]
        self._to_bytes, self._drops_first_space = _byte_rule(decoder)
        added = core.get_added_tokens_decoder()
        self._special = frozenset(token for token, info in added.items() if info.special)
        self._literal = {token: info.content.encode() for token, info in added.items()}  # written as they are
        self._bos: int | None = backend.bos_token_id
        self._bytes: dict[int, bytes] = {}  # filled as tokens are seen
        self._max_token_bytes = max((len(piece.encode()) for piece in core.get_vocab()), default=1)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hub.chat_template)

    @property
    def drops_first_space(self) -> bool:
        return self._drops_first_space

    @property
    def max_token_bytes(self) -> int:
        return self._max_token_bytes

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # The batch call, because only it lets other threads run meanwhile.
        ids: list[int] = self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if self._bos is not None and ids[:2] == [self._bos, self._bos] and add_special_tokens:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return detokenize(self, ids, skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        data = self._bytes.get(token)
        if data is None:
            piece = self._core.id_to_token(token)
            data = b"" if piece is None else self._literal.get(token) or self._to_bytes(piece)
            self._bytes[token] = data
        return data

    def is_special(self, token: int) -> bool:
        return token in self._special

    @property
    def template_variables(self) -> frozenset[str]:
        return _names_read(self._hub.get_chat_template())

    def check_template(self) -> None:
        """Raises TokenizerError for a chat template that no conversation can be rendered with."""
        templates = self._hub.chat_template
        if isinstance(templates, dict) and "default" not in templates:
            names = ", ".join(templates)
            raise TokenizerError(f"none of the templates ({names}) is called default: choose one with --chat-template")
        if not self.has_chat_template:
            return
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except TemplateError as error:  # unless it is about the template, it is about this conversation
            cause = error.__cause__
            if isinstance(cause, jinja2.TemplateSyntaxError):
                reason = f"the chat template is not Jinja, line {cause.lineno}: {cause.message}"
                raise TokenizerError(f"{reason}. Correct it, or give another with --chat-template") from error
            if isinstance(cause, ImportError):  # a Jinja too old for transformers
                raise TokenizerError(str(cause)) from error
        if "messages" not in self.template_variables:
            raise TokenizerError("the chat template never reads messages: all conversations would be one prompt")

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        try:
            return str(self._hub.apply_chat_template(list(messages), tokenize=False, **options))
        except Exception as error:  # whatever a template raises is about the messages it was given
            raise TemplateError(f"The chat template refused the messages: {error}") from error


def load_tokenizer(folder: Path, chat_template: Path | None = None) -> HubTokenizer:
    """Read the tokenizer of a checkpoint: a folder, or a GGUF file. Raises TokenizerError, or another ValueError."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that no model library was imported
    is_file = folder.suffix == GGUF
    if not is_file and not any(
        path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)
    ):  # libraries would guess at other reasons
        raise TokenizerError(f"{folder} has no tokenizer: put the model's tokenizer.json (or tokenizer.model) there")
    try:
        template = chat_template.read_text(encoding="utf-8") if chat_template else None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TokenizerError(f"--chat-template {chat_template} cannot be read: {reason}") from error
    if template is not None and not template.strip():
        raise TokenizerError(f"--chat-template {chat_template} is empty")
    try:
        backend, own_template = file_tokenizer(folder) if is_file else (_read(folder), None)
        tokenizer = HubTokenizer(backend, template or own_template)
    except Exception as error:  # a damaged file makes the libraries raise whatever comes up
        raise TokenizerError(f"The tokenizer in {folder} cannot be read: {error}") from error
    try:
        tokenizer.check_template()
    except TokenizerError as error:
        raise TokenizerError(f"{_template_place(folder, chat_template)}: {error}") from error
    return tokenizer


def _template_place(folder: Path, chat_template: Path | None) -> str:
    """Where the chat template comes from, in the order in which places are looked at."""
    if chat_template is not None:
        return f"--chat-template {chat_template}"
    if folder.suffix == GGUF:
        return f"{folder}, tokenizer.chat_template"
    file = folder / "chat_template.jinja"
    return str(file) if file.is_file() else f"{folder / 'tokenizer_config.json'}, chat_template"


def _read(folder: Path) -> Any:
    if (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast  # the file as it is; imports no torch

        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoTokenizer  # converts tokenizer.model and the like; this one imports torch

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _names_read(template: str) -> frozenset[str]:
    """Names in the code of a Jinja template that are not behind a dot. Its text and comments do not count.

    Only the lexer is used: it knows no statements, so it reads templates for any set of extensions.
    """
    names, before = set(), ""
    for _, kind, value in jinja2.Environment().lex(template):
        if kind == "name" and before != ".":
            names.add(value)
        if kind != "whitespace":
            before = value
    return frozenset(names)


def _byte_rule(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """How a token becomes bytes, and whether the first space of a text is dropped. Raises TokenizerError."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        table = _byte_level_table()
        return lambda piece: _byte_level(piece, table), False
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return _sentencepiece, any(map(_strips_start, steps))
    raise TokenizerError(f"its decoder ({', '.join(sorted(kinds)) or 'none'}) is neither byte level nor SentencePiece")


def _strips_start(step: dict[str, Any]) -> bool:
    if step["type"] == "Strip":
        return bool(step["content"] == " " and step["start"] > 0)
    return bool(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")


def _sentencepiece(piece: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(METASPACE, " ").encode()


def _byte_level(piece: str, table: Mapping[str, int]) -> bytes:
    """A character outside the table means that the piece was never byte level: plain text."""
    try:
        return bytes(table[character] for character in piece)
    except KeyError:
        return piece.encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others for 256, 257 ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
