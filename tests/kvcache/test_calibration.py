"""The calibration artifact: what is written is read, and nothing that is damaged or made for another model is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from kernels.attention.quantized.transforms import Chain, Hadamard, Identity, Permutation
from kvcache.calibration import Calibration, CalibrationError, Header, read_calibration, write_calibration
from kvcache.codecs import calibrated_codec, uncalibrated_codec
from kvcache.policy import read_policy

L, H, D, G = 2, 3, 16, 8
HEADER = Header(
    format="kvcal/1",
    fingerprint="abc",
    num_layers=L,
    num_kv_heads=H,
    head_dim=D,
    group_size=G,
    bits=((4.0, 2.0), (16.0, 2.0)),
    hadamard=((True, False), (False, True)),
    rope="after",
    clip_mode="origin",
    parameters="e4m3",
    window=128,
    num_sinks=4,
    provenance="a test",
)


def calibration(rotated: bool = False, **changes: Any) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    perms = torch.stack([torch.randperm(D, generator=generator) for _ in range(2 * L * H)]).view(2, L, H, D).short()
    rotation = torch.linalg.qr(torch.randn(L, H, D, D, generator=generator))[0]
    tensors: dict[str, Tensor | Header] = {
        "header": HEADER,
        "k_perm": perms[0],
        "v_perm": perms[1],
        "k_clip": torch.full((L, H, D // G), 0.75).half(),
        "v_clip": torch.full((L, H, D // G), 0.5).half(),
        "k_ps": torch.full((L, H), 0.25),
        "v_ps": torch.full((L, H), 8.0),
        "k_mean": torch.randn(L, H, D, generator=generator),
        "k_scale": torch.full((L, H, D), 0.5),
    }
    if rotated:
        tensors["v_rot"] = rotation
    return Calibration(**(tensors | changes))


@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_written_is_read(tmp_path: Path, rotated: bool) -> None:
    path, written = tmp_path / "kvcal.safetensors", calibration(rotated)
    write_calibration(path, written)
    read = read_calibration(path, "abc")
    assert read.header == HEADER
    assert read.tensors().keys() == written.tensors().keys()
    for name, tensor in read.tensors().items():
        assert torch.equal(tensor, written.tensors()[name])


def test_the_digest_follows_the_content() -> None:
    """Bug: pages quantized with old clips found under the name of new ones."""
    first, same, other = (
        calibration(v_clip=torch.full((L, H, D // G), clip).half()).digest for clip in (0.5, 0.5, 0.75)
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_perm": torch.zeros(L, H, D, dtype=torch.int16)}, "k_perm is not a permutation"),
        ({"v_clip": torch.zeros(L, H, D // G).half()}, "v_clip must be above 0"),
        ({"k_clip": torch.full((L, H, D // G), torch.nan).half()}, "k_clip must be above 0"),
        ({"k_ps": torch.full((L, H), 0.3)}, "k_ps must hold powers of two"),
        ({"v_ps": torch.ones(L, H + 1)}, r"v_ps is torch.float32 \[2, 4\], expected torch.float32 \[2, 3\]"),
        ({"v_perm": torch.arange(D).expand(L, H, D)}, r"v_perm is torch.int64 .* expected torch.int16"),
        ({"k_mean": torch.full((L, H, D), torch.inf)}, "k_mean must be finite"),
        ({"k_rot": torch.ones(L, H, D, D)}, "k_rot is not orthogonal"),
        ({"header": msgspec.structs.replace(HEADER, bits=((4.0, 4.0),))}, "bits are given for 1 layers of 2"),
    ],
)
def test_artifacts_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    """Bug: a damaged artifact that only shows as worse answers."""
    with pytest.raises(CalibrationError, match=message):
        calibration(**changes)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kvcal.safetensors"
    write_calibration(path, calibration())
    with pytest.raises(CalibrationError, match=r"kvcal\.safetensors was made for .* abc, this one has xyz"):
        read_calibration(path, "xyz")


def metadata(**changes: Any) -> dict[str, str]:
    return {"kvcal": msgspec.json.encode(msgspec.to_builtins(HEADER) | changes).decode()}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "no metadata 'kvcal'"),
        ({"kvcal": "{"}, "damaged metadata"),
        (metadata(format="kvcal/2"), r"another version: Invalid enum value 'kvcal/2'"),
        (metadata(surprise=1), "unknown field `surprise`"),
        (metadata(fused=True), "unknown field `fused`"),
        (metadata(rope="before"), "Invalid enum value 'before'"),
        (metadata(num_layers="two"), "Expected `int`"),
    ],
)
def test_metadata_is_checked(tmp_path: Path, held: dict[str, str], message: str) -> None:
    path = tmp_path / "kvcal.safetensors"
    safetensors.torch.save_file(calibration().tensors(), path, held)
    with pytest.raises(CalibrationError, match=message):
        read_calibration(path, "abc")


def test_tensors_are_all_there_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "kvcal.safetensors"
    tensors = calibration().tensors()
    safetensors.torch.save_file({name: tensors[name] for name in tensors if name != "v_ps"}, path, metadata())
    with pytest.raises(CalibrationError, match="lacks tensors: v_ps"):
        read_calibration(path, "abc")
    safetensors.torch.save_file(tensors | {"q_perm": torch.ones(1)}, path, metadata())
    with pytest.raises(CalibrationError, match="unknown tensors: q_perm"):
        read_calibration(path, "abc")


@pytest.mark.parametrize("content", [None, b"not a safetensors file"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "kvcal.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"kvcal\.safetensors cannot be read"):
        read_calibration(path, "abc")


def test_a_layer_gets_its_own_part() -> None:
    """Bug: the clips of keys used for values, or those of layer 0 everywhere."""
    found = calibration(rotated=True, k_ps=torch.tensor([[1.0] * H, [2.0] * H]))
    layers = read_policy("skvq:k4v2:g8:w32/1=skvq:k16v2:g8").layers(L, D, has_artifact=True)
    codec = calibrated_codec(layers[1], found, 1)
    assert (codec.keys.layout.bits, codec.values.layout.bits, codec.window, codec.num_sinks) == (16, 2, 32, 4)
    assert codec.keys.prescale.tolist() == [2.0] * H
    assert bool((codec.values.clip == 0.5).all())
    assert codec.values.mode == "origin"
    assert isinstance(codec.key_transform, Permutation)
    assert torch.equal(codec.key_transform.order, found.k_perm[1].long())
    assert isinstance(codec.value_transform, Chain)


def test_other_widths_than_calibrated_are_refused() -> None:
    layer = read_policy("skvq:k2v2:g8").layers(L, D, has_artifact=True)[0]
    with pytest.raises(CalibrationError, match=r"2 and 2 bits in groups of 8, and was calibrated for 4 and 2"):
        calibrated_codec(layer, calibration(), 0)


def test_without_an_artifact_channels_are_rotated_and_clipped_by_width() -> None:
    layer = read_policy("k2v8").layers(1, 128)[0]
    codec = uncalibrated_codec(layer, 2, 128)
    assert isinstance(codec.key_transform, Hadamard)
    assert 0.6 < float(codec.keys.clip[0, 0]) < 0.7
    assert float(codec.values.clip[0, 0]) == 1
    plain = uncalibrated_codec(replace(layer, transform="plain"), 2, 128, (torch.full((2,), 4.0), torch.ones(2)))
    assert isinstance(plain.value_transform, Identity)
    assert float(plain.keys.clip[0, 0]) == 1
    assert plain.keys.prescale.tolist() == [4.0, 4.0]
