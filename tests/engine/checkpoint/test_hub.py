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
            "no folder owner/name here.* cannot be reached: no route to host$",
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
