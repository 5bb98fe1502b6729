"""The name of a model -> a folder: an existing one as it is, any other name a snapshot from the Hugging Face hub.

Nothing here imports torch: the server asks for the folder before the engine starts.
"""

from difflib import get_close_matches
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from engine.checkpoint.errors import HubError

WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
UNWANTED = ("*/*", "consolidated*.safetensors", "adapter_model*.safetensors")  # other copies and parts of the model


def resolve(model: str, revision: str | None = None, offline: bool = False, cache: Path | None = None) -> Path:
    """Return the folder of `model`, a folder or "owner/name" on the hub; `revision` is a branch, tag or commit.

    `offline` uses what is in the cache and asks nobody; `cache` is the hub's own when None. Raises HubError, which
    says what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise HubError(f"revision {revision!r} applies to models on the hub, but {model} is a folder")
        return folder
    if folder.exists():
        raise HubError(f"{model} is a file: give the folder that holds it")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model or _is_beside_others(folder):
        raise HubError(f"there is no folder {model}{_neighbour(folder)}")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id=model,
                revision=revision,
                cache_dir=cache,
                local_files_only=offline,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
        )
    except Exception as error:  # the hub's own, and those of whichever HTTP library its release uses
        raise HubError(_explanation(error, model, revision, offline)) from None


def _is_beside_others(folder: Path) -> bool:
    """Whether the path leads into an existing folder: then a spelling is wrong, not a network."""
    return folder.parent != Path() and folder.parent.is_dir()


def _neighbour(folder: Path) -> str:
    """A hint at the folder that was probably meant."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    matches = get_close_matches(folder.name, names, n=1)
    return f": did you mean {folder.parent / matches[0]}?" if matches else ""


def _explanation(error: Exception, model: str, revision: str | None, offline: bool) -> str:
    """What happened and what to do. The order matters: a gated repository is also one that was not found."""
    wanted = model if revision is None else f"{model} at revision {revision}"
    page = f"https://huggingface.co/{model}"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    here = f"there is no folder {model} here, and looked up as a model of the hub, {wanted}"
    absent = (
        f"{here} is not (wholly) in the cache, which is all that --offline uses. Check the spelling; if the model "
        "exists, run once without --offline to fetch it"
        if offline
        else f"{here} is not in the cache and the hub cannot be reached: {first_line}"
    )
    explanations = (
        (hub_errors.HFValidationError, f"{model!r} is neither a folder nor a model name of the form owner/name"),
        (
            hub_errors.GatedRepoError,
            f"{model} is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN",
        ),
        (
            hub_errors.RepositoryNotFoundError,
            f"{model} is neither a folder nor a model on the hub. Check the spelling; if it is private, log in with "
            "`hf auth login` or set HF_TOKEN",
        ),
        (hub_errors.RevisionNotFoundError, f"{model} has no revision {revision!r}; {page}/commits lists those it has"),
        (hub_errors.LocalEntryNotFoundError, absent),
    )
    unknown = f"{here} could not be fetched: {first_line}"
    return next((text for kind, text in explanations if isinstance(error, kind)), unknown)
