"""Names of models -> folders, with the hub's client replaced: there is no network in a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from engine.checkpoint.errors import HubError
from engine.checkpoint.hub import resolve

Fail = Callable[[Exception], None]


def http_error(kind: type[hub_errors.HfHubHTTPError]) -> Exception:
    """One of the client's errors, without the HTTP response it was made from."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error. (Request ID: x)\n\nmore",)
    return error


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Make every download end in the given error."""

    def install(error: Exception) -> None:
        def snapshot_download(**_: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    return install


def test_a_folder_is_used_as_it_is(tmp_path: Path, fail: Fail) -> None:
    """A local model must load on a machine that has never seen the hub."""
    fail(AssertionError("asked the hub"))
    assert resolve(str(tmp_path)) == tmp_path


def test_the_snapshot_is_pinned_and_filtered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without patterns, pickles and second copies of the weights come along; without revision, another model."""
    asked: dict[str, Any] = {}

    def snapshot_download(**arguments: Any) -> str:
        asked.update(arguments)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name", revision="v1.0", offline=True, cache=tmp_path / "cache") == tmp_path
    assert (asked["repo_id"], asked["revision"], asked["local_files_only"]) == ("owner/name", "v1.0", True)
    assert asked["cache_dir"] == tmp_path / "cache"
    files = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt",
        "pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "original/model.safetensors", "model.gguf",
    ]  # fmt: skip
    kept = filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == files[:5]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(hub_errors.GatedRepoError), r"gated: accept its terms at https://huggingface\.co/owner/name"),
        (http_error(hub_errors.RepositoryNotFoundError), "neither a folder nor a model on the hub"),
        (http_error(hub_errors.RevisionNotFoundError), "has no revision 'v9'"),
        (http_error(hub_errors.HfHubHTTPError), r"owner/name at revision v9 could not be fetched: 401"),
        (
            hub_errors.LocalEntryNotFoundError("no route to host\nmore"),
            r"no folder owner/name here.* cannot be reached \(no route to host\)\. Check the spelling and the network$",
        ),
        (hub_errors.HFValidationError("bad"), "nor a model name of the form owner/name"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "could not be fetched: RuntimeError"),
    ],
)
def test_errors_say_what_to_do(error: Exception, message: str, fail: Fail) -> None:
    """The client's own messages are pages about its API; a gated model reads there as one that does not exist."""
    fail(error)
    with pytest.raises(HubError, match=message) as caught:
        resolve("owner/name", revision="v9")
    assert caught.value.__suppress_context__, "the client's own traceback is pages long"
    assert "\n" not in str(caught.value)


def test_offline_without_a_copy(fail: Fail) -> None:
    """The remedy is the flag the user gave, not their network."""
    fail(hub_errors.LocalEntryNotFoundError("x"))
    with pytest.raises(HubError, match=r"no folder owner/name here.*Check the spelling.*run once without --offline"):
        resolve("owner/name", offline=True)


def test_the_real_client_offline(tmp_path: Path) -> None:
    """The arguments must be those of the installed client, and an empty cache its own error."""
    with pytest.raises(HubError, match=r"owner/name is not \(wholly\) in the cache"):
        resolve("owner/name", offline=True, cache=tmp_path)
    with pytest.raises(HubError, match="owner/name"):
        resolve("not a name!", offline=True, cache=tmp_path)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "a\\b"])
def test_paths_that_do_not_exist_are_not_asked_of_the_hub(model: str, fail: Fail) -> None:
    """A misspelled path must not become "repository not found"."""
    fail(AssertionError("asked the hub"))
    with pytest.raises(HubError, match="there is no folder"):
        resolve(model)


def test_a_misspelt_folder_beside_others_is_not_asked_of_the_hub(
    tmp_path: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`demo/checkpont` has the form of a repository id: the network must not be blamed for a spelling."""
    fail(AssertionError("asked the hub"))
    (tmp_path / "demo" / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=r"there is no folder demo/checkpont: did you mean demo/checkpoint\?"):
        resolve("demo/checkpont")
    with pytest.raises(HubError, match=r"there is no folder demo/zzz$"):
        resolve("demo/zzz")


def test_a_file_or_a_pinned_folder_is_a_mistake(tmp_path: Path) -> None:
    """A revision that is silently ignored serves other weights than the user pinned."""
    with pytest.raises(HubError, match="applies to models on the hub"):
        resolve(str(tmp_path), revision="main")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(HubError, match="give the folder"):
        resolve(str(tmp_path / "model.safetensors"))


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_gguf_file_is_used_as_it_is(tmp_path: Path, fail: Fail) -> None:
    """By its path, or as the only model of a folder; of a split one, all files are one model."""
    fail(AssertionError("asked the hub"))
    folder = touch(tmp_path, "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf", "README.md")
    assert resolve(str(folder / "m-00002-of-00002.gguf")) == folder / "m-00002-of-00002.gguf"
    assert resolve(str(folder)) == folder / "m-00001-of-00002.gguf"
    with pytest.raises(HubError, match="applies to models on the hub"):
        resolve(str(folder / "m-00001-of-00002.gguf"), revision="main")
    touch(folder, "m-Q8_0.gguf")
    with pytest.raises(
        HubError, match=r"holds 2 GGUF models: name one, by its path. There are m-00001-of-00002\.gguf, m-Q"
    ):
        resolve(str(folder))
    touch(folder, "model.safetensors")
    assert resolve(str(folder)) == folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub with one repository, whose files are fetched as asked; returns the folder of what it holds."""
    there, snapshot = tmp_path / "there", tmp_path / "snapshot"
    snapshot.mkdir()

    def names(*_: Any, **__: Any) -> list[str]:
        return sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file())

    def snapshot_download(allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> str:
        touch(snapshot, *filter_repo_objects(names(), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", names)
    return there


def test_a_gguf_file_of_a_repository(repository: Path, tmp_path: Path) -> None:
    """Only the file that is named is fetched: the others are the same model again, gigabytes each."""
    touch(repository, "m-Q4_K_M.gguf", "big/m-00001-of-00002.gguf", "big/m-00002-of-00002.gguf", "README.md")
    snapshot = tmp_path / "snapshot"
    assert resolve("owner/name:m-Q4_K_M.gguf") == snapshot / "m-Q4_K_M.gguf"
    assert [path.name for path in snapshot.rglob("*.gguf")] == ["m-Q4_K_M.gguf"]
    assert resolve("owner/name:big/m-00001-of-00002.gguf").parent == snapshot / "big"
    assert (snapshot / "big" / "m-00002-of-00002.gguf").is_file()
    choices = r"big/m-00001-of-00002\.gguf, m-Q4_K_M\.gguf"
    with pytest.raises(HubError, match=rf"owner/name has no file m-Q9\.gguf; it has {choices}"):
        resolve("owner/name:m-Q9.gguf")
    with pytest.raises(
        HubError, match=rf"holds 2 GGUF models: name one, as in owner/name:FILE\.gguf. There are {choices}"
    ):
        resolve("owner/name")


def test_the_only_gguf_file_of_a_repository_is_meant(repository: Path, tmp_path: Path) -> None:
    """Unless there are safetensors: then the repository is a checkpoint with a copy beside it."""
    touch(repository, "m.gguf", "config.json")
    assert resolve("owner/name") == tmp_path / "snapshot" / "m.gguf"
    touch(repository, "model.safetensors")
    assert resolve("owner/name") == tmp_path / "snapshot"
