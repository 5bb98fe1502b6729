"""The name of a model -> a folder or a GGUF file: an existing one as it is, else a snapshot from the Hugging Face hub.

Nothing here imports torch, and the hub's library only for models that are there: the server asks for the folder before
the engine starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from engine.checkpoint.errors import HubError
from engine.checkpoint.gguf_choice import SUFFIX, files_of, models_among, only_model

WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
UNWANTED = ("*/*", "consolidated*.safetensors", "adapter_model*.safetensors")  # other copies and parts of the model


def resolve(model: str, revision: str | None = None, offline: bool = False, cache: Path | None = None) -> Path:
    """Return the folder of `model`, a folder or "owner/name" on the hub; `revision` is a branch, tag or commit.

    Or a GGUF file: one that is named, alone or as "owner/name:file.gguf", or the only one of a folder.
    `offline` uses what is in the cache and asks nobody; `cache` is the hub's own when None. Raises HubError, which
    says what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise HubError(f"revision {revision!r} applies to models on the hub, but {model} is a folder")
        return _file_in(folder) or folder
    if folder.is_file() and folder.suffix == SUFFIX:
        if revision is not None:
            raise HubError(f"revision {revision!r} applies to models on the hub, but {model} is a file")
        return folder
    if folder.exists():
        raise HubError(f"{model} is a file: give the folder that holds it")
    repository, _, file = model.partition(":") if model.endswith(SUFFIX) else (model, "", "")
    if (
        repository.startswith(("/", ".", "~"))
        or repository.count("/") > 1
        or "\\" in model
        or _is_beside_others(folder)
    ):
        raise HubError(f"there is no folder {model}{_neighbour(folder)}")
    source = _Repository(repository, revision, offline, cache)
    if file:
        return source.file(file)
    snapshot = source.download(list(WANTED))
    if any(snapshot.glob("*.safetensors")):
        return snapshot
    only = only_model(source.names(snapshot), repository, f"as in {repository}:FILE{SUFFIX}")
    return snapshot if only is None else source.file(only)


@dataclass(frozen=True)
class _Repository:
    """A model on the hub, or in its cache. Every method raises HubError."""

    name: str
    revision: str | None
    offline: bool
    cache: Path | None

    def download(self, patterns: list[str], unwanted: Sequence[str] = UNWANTED) -> Path:
        """The folder of a snapshot that holds the files of these patterns."""
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repo_id=self.name,
                    revision=self.revision,
                    cache_dir=self.cache,
                    local_files_only=self.offline,
                    allow_patterns=patterns,
                    ignore_patterns=list(unwanted),
                )
            )
        except Exception as error:  # the hub's own, and those of whichever HTTP library its release uses
            raise HubError(_explanation(error, self.name, self.revision, self.offline)) from None

    def names(self, snapshot: Path) -> list[str]:
        """Its files; of those in the cache when offline."""
        import huggingface_hub

        if self.offline:
            return [str(path.relative_to(snapshot)) for path in snapshot.rglob(f"*{SUFFIX}")]
        try:
            return list(huggingface_hub.list_repo_files(self.name, revision=self.revision))
        except Exception as error:
            raise HubError(_explanation(error, self.name, self.revision, self.offline)) from None

    def file(self, name: str) -> Path:
        """One GGUF file, all its parts fetched."""
        snapshot = self.download(files_of(name), unwanted=())
        if (snapshot / name).is_file():
            return snapshot / name
        choices = ", ".join(models_among(self.names(snapshot))) or "no GGUF files"
        raise HubError(f"{self.name} has no file {name}{' in the cache' if self.offline else ''}; it has {choices}")


def _file_in(folder: Path) -> Path | None:
    """The GGUF model of a folder that holds one and no safetensors."""
    if any(folder.glob("*.safetensors")):
        return None
    only = only_model((path.name for path in folder.glob(f"*{SUFFIX}")), str(folder), "by its path")
    return None if only is None else folder / only


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
    from huggingface_hub import errors as hub_errors

    wanted = model if revision is None else f"{model} at revision {revision}"
    page = f"https://huggingface.co/{model}"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    here = f"there is no folder {model} here, and looked up as a model of the hub, {wanted}"
    absent = (
        f"{here} is not (wholly) in the cache, which is all that --offline uses. Check the spelling; if the model "
        "exists, run once without --offline to fetch it"
        if offline
        else f"{here} is not in the cache and the hub cannot be reached ({first_line}). Check the spelling and the "
        "network"
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
