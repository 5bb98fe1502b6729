"""An engine that starts on a calibration artifact, or says why it cannot."""

from pathlib import Path
from shutil import copytree

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig

from engine.assembly import StartError, build
from engine.calibration.fingerprint import fingerprint
from engine.config import EngineConfig
from engine.loading import open_checkpoint
from engine.messages import PlanSummary
from kvcache.calibration import FILE_NAME
from tests.engine.artifacts import write_random
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES

POLICY = "skvq:k2v2:g16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, LlamaConfig(**SIZES, head_dim=32))
    return made


def start(folder: Path, policy: str = POLICY, artifact: Path | None = None) -> PlanSummary:
    named = None if artifact is None else str(artifact)
    return build(EngineConfig(str(folder), kv_policy=policy, kv_calibration=named))[1]


def test_the_start_screen_says_what_the_cache_runs_on(folder: Path, tmp_path: Path) -> None:
    """Bug: a calibrated checkpoint that is served without its calibration, or the reverse, in silence."""
    assert any("not calibrated: no kvcal.safetensors" in note for note in start(folder).notes)
    assert not any("calibrated" in note for note in start(folder, "k2v2").notes)
    artifact = write_random(folder, POLICY, tmp_path / "cal")
    assert any("calibrated on nothing (artifact " in note for note in start(folder, artifact=artifact).notes)


def test_the_file_beside_the_checkpoint_is_found_and_is_no_weight(folder: Path, tmp_path: Path) -> None:
    """Bug: the artifact's tensors counted as a model's, where its files have no index."""
    copy = tmp_path / "copy"
    copytree(folder, copy)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    write_random(copy, POLICY, copy / FILE_NAME)
    assert any("calibrated on nothing" in note for note in start(copy).notes)
    assert any("calibrated on nothing" in note for note in start(copy, f"{POLICY}:w0:s0").notes)
    assert not any("calibrated" in note for note in start(copy, "k2v2").notes)


def test_every_part_of_an_artifact_is_used(folder: Path, tmp_path: Path) -> None:
    """Bug: pages under one name that hold the bytes of another artifact; an artifact read and then forgotten."""
    artifact = write_random(folder, POLICY, tmp_path / "cal")
    turned = build(EngineConfig(str(folder), kv_policy=POLICY, kv_calibration=str(artifact)))[0].parts
    plain = build(EngineConfig(str(folder), kv_policy=POLICY))[0].parts
    assert turned.storage.layout.salt != plain.storage.layout.salt
    codec = turned.storage.layers[1].codec
    assert not torch.equal(codec.keys.clip, plain.storage.layers[1].codec.keys.clip)
    heads = torch.randn(3, SIZES["num_key_value_heads"], 32)
    assert not torch.equal(codec.key_transform.apply(heads), codec.value_transform.apply(heads))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("k2v2", r"policy k2v2:w128:s4 uses no calibration, and --kv-calibration names .*cal: leave it out"),
        (
            "skvq:k4v2:g16",
            r"policy skvq:k4v2:g16:w128:s4 and .*cal: layer 0 is to have 4 and 2 bits .*calibrate for th",
        ),
        ("skvq:k2v2:g8", r"in groups of 8, and was calibrated for 2 and 2 in groups of 16"),
    ],
)
def test_an_artifact_for_another_policy_is_refused(folder: Path, tmp_path: Path, policy: str, message: str) -> None:
    """Bug: an option accepted and ignored; clips searched for other groups."""
    with pytest.raises(StartError, match=message):
        start(folder, policy, write_random(folder, POLICY, tmp_path / "cal"))


def test_an_artifact_for_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """Bug: statistics of a model's earlier weights, kept beside its new ones."""
    artifact = write_random(folder, POLICY, tmp_path / "cal")
    other = tmp_path / "other"
    other.mkdir()
    write_checkpoint(other, LlamaConfig(**SIZES, head_dim=32), seed=1)
    with pytest.raises(StartError, match=r"cal was made for a model with fingerprint .*: calibrate this model"):
        start(other, artifact=artifact)
    with pytest.raises(StartError, match=r"nowhere cannot be read"):
        start(folder, artifact=tmp_path / "nowhere")


def test_a_fingerprint_knows_weights_and_not_files(folder: Path, tmp_path: Path) -> None:
    """Bug: a model that must be calibrated again because somebody cut its files in two."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a": names[::2], "b": names[1::2]}

    def of(changed: dict[str, torch.Tensor]) -> str:
        copy = tmp_path / "copy"
        copytree(folder, copy, dirs_exist_ok=True)
        (copy / "model.safetensors").unlink()
        for shard, held in shards.items():
            safetensors.torch.save_file({name: changed[name] for name in held}, copy / f"{shard}.safetensors")
        checkpoint = open_checkpoint(copy)
        return fingerprint(checkpoint.config, checkpoint.source)

    whole = open_checkpoint(folder)
    expected = fingerprint(whole.config, whole.source)
    assert of(tensors) == expected
    keys = "model.layers.1.self_attn.k_proj.weight"
    assert of(tensors | {keys: tensors[keys] + 1}) != expected
    assert of(tensors | {"model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"] + 1}) == (
        expected
    )
