"""The tokenizer of a model, for what tokenizes beside the engine: LLM and nibble calibrate. The server has its own."""

import json
from pathlib import Path
from typing import Any

from engine.checkpoint.errors import FilesError
from engine.checkpoint.gguf_choice import SUFFIX
from engine.client import TOKENIZER_FILES, file_tokenizer


def read_tokenizer(path: Path) -> Any:
    """As transformers holds one: of a folder, the file as it is where there is one, or of a GGUF file.

    Raises FilesError (a CheckpointError) naming what is missing or damaged.
    """
    if path.suffix != SUFFIX and not any(file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
        raise FilesError(f"{path} has no tokenizer: put the model's tokenizer.json (or tokenizer.model) there")
    try:
        backend = _read(path)
    except Exception as error:  # a damaged file makes the libraries raise whatever comes up
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = _damaged_part(path)
        raise FilesError(
            f"the tokenizer in {place} cannot be read ({reason}): put the model's own in its place"
        ) from error
    if getattr(backend, "backend_tokenizer", None) is None:
        raise FilesError(f"{type(backend).__name__} of {path} is not backed by the tokenizers library")
    return backend


def _read(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if path.suffix == SUFFIX:
        backend, template = file_tokenizer(path)
        backend.chat_template = template
        return backend
    is_file = (path / "tokenizer.json").exists()
    return (PreTrainedTokenizerFast if is_file else AutoTokenizer).from_pretrained(str(path), local_files_only=True)


def _damaged_part(path: Path) -> Path:
    """The file that is not JSON, or the whole."""
    for file in (path / "tokenizer.json", path / "tokenizer_config.json"):
        try:
            if file.exists():
                json.loads(file.read_bytes())
        except (OSError, ValueError):
            return file
    return path
