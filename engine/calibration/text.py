"""A text file -> texts of equal length in token ids: most to fit on, the last ones held out."""

from dataclasses import dataclass
from pathlib import Path

from engine.messages import CalibrationSettings
from engine.tokenizer import read_tokenizer
from kvcache.calibration import CalibrationError
from kvcache.layout import PageLayout

LONGEST = 2048  # tokens of one text
FEWEST_TEXTS = 4
HISTORY = 64  # tokens, at least, beyond window and sinks


@dataclass(frozen=True)
class Texts:
    """What a calibration runs on."""

    ids: tuple[tuple[int, ...], ...]  # of equal length
    num_fit: int  # the others are held out
    provenance: str


def read_texts(settings: CalibrationSettings, context_len: int, layout: PageLayout) -> Texts:
    """Raises CalibrationError when there is no text, or too little for the policy's window."""
    path = Path(settings.data)
    ids = _ids(Path(settings.model), path)[: settings.num_tokens]
    least = layout.policy.window + layout.policy.num_sinks + HISTORY
    length = min(LONGEST, context_len, max(least, len(ids) // FEWEST_TEXTS))
    if least > context_len:
        raise CalibrationError(f"policy {layout.policy} quantizes nothing of {context_len} tokens, the model's context")
    if len(ids) < FEWEST_TEXTS * length:
        raise CalibrationError(
            f"{path} gives {len(ids):,} tokens, and {FEWEST_TEXTS} texts of {length:,} are needed: use a longer file, "
            "raise --tokens, or shorten the window of the policy"
        )
    texts = tuple(tuple(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length))
    num_held_out = max(1, len(texts) // 4)
    return Texts(texts, len(texts) - num_held_out, f"{len(texts)} x {length:,} tokens of {path.name}")


def _ids(model: Path, path: Path) -> list[int]:
    """The whole file as one text. Raises CalibrationError, or CheckpointError for the tokenizer."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CalibrationError(f"the text {path} cannot be read: {reason}") from error
    ids: list[int] = read_tokenizer(model)(text, verbose=False)["input_ids"]
    return ids
