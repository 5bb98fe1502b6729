"""Which GGUF file of several is meant."""

from collections.abc import Iterable

from engine.checkpoint.errors import HubError
from engine.checkpoint.gguf_file import SHARD

SUFFIX = ".gguf"
NOT_MODELS = ("mmproj", "imatrix")  # beside a model, not of it
MAX_SHOWN = 30


def models_among(names: Iterable[str]) -> list[str]:
    """The models among the files of a folder or repository; of one that is split, the first file."""
    found = []
    for name in sorted(names):
        last = name.rsplit("/", 1)[-1]
        if not last.endswith(SUFFIX) or last.startswith(NOT_MODELS):
            continue
        shard = SHARD.fullmatch(last)
        if shard is None or int(shard["number"]) == 1:
            found.append(name)
    return found


def only_model(names: Iterable[str], where: str, how: str) -> str | None:
    """The one model among the files, or None. Raises HubError with the choices, and `how` to name one, for several."""
    found = models_among(names)
    if len(found) > 1:
        shown = ", ".join(found[:MAX_SHOWN]) + (f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else "")
        raise HubError(f"{where} holds {len(found)} GGUF models: name one, {how}. There are {shown}")
    return found[0] if found else None


def files_of(name: str) -> list[str]:
    """A pattern for every file of the model: the other parts of one that is split."""
    shard = SHARD.fullmatch(name)
    return [name if shard is None else f"{shard['stem']}-*-of-{shard['count']}{SUFFIX}"]
