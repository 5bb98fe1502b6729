"""The container: every family and transform written and read again, and configs and tensors that are refused."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.errors import FormatRefused, TensorError
from engine.checkpoint.nibble import read_config, write_layer, write_settings
from engine.checkpoint.source import Source
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.codebook.layout import CodebookWeights
from kernels.linear.table.tables import E2M1, TERNARY
from kernels.linear.transforms import BlockRotation, Diagonal, Hadamard, Permutation
from kernels.linear.weights import LinearWeights, Term
from kernels.registry import families
from tests.kernels.weights import example, random_affine, random_codebook, random_lookup, random_table

NAME = "model.layers.0.self_attn.q_proj"
SHAPE = (24, 96)
ACTIVATION_FAMILIES = {"fp8", "int8"}  # rounded activations: formats of their own hold them


def shared_zero() -> AffineWeights:
    weights = random_affine(3, 96, 24, 32, torch.bfloat16, 1)
    zeros = torch.tensor([[4]], dtype=torch.uint8).expand(24, 3)
    return AffineWeights(3, 96, 32, weights.codes, torch.full((24, 3), 0.25, dtype=torch.bfloat16), zeros)


TERMS: dict[str, Term] = {
    **{family: example(family, 96, 24, 7) for family in set(families("kernels.linear")) - ACTIVATION_FAMILIES},
    "affine powers of two, one zero": shared_zero(),
    "affine float zeros": replace(random_affine(4, 96, 24, 32, torch.float16, 7), zeros=torch.rand(24, 3)),
    "table nvfp4": random_table(E2M1, 96, 24, 16, torch.float8_e4m3fn, 2),
    "table mxfp4": random_table(E2M1, 96, 24, 32, torch.float8_e8m0fnu, 2),
    "table ternary": random_table(TERNARY, 96, 24, 96, torch.float16, 2),
    "codebook 16 bits": random_codebook(4, 65536, 96, 24, 48, 3),
    "lookup short group": random_lookup(3, 96, 24, 40, 3),
}


def write(folder: Path, weights: LinearWeights, change: Callable[[dict[str, Tensor]], object] | None = None) -> Source:
    """A checkpoint of one layer, changed where a test wants it damaged."""
    scheme, tensors = write_layer(NAME, weights)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": write_settings({NAME: scheme}, "by hand")}
    (folder / "config.json").write_text(json.dumps(config))
    return Source(folder)


def read(source: Source, bias: bool = False) -> LinearWeights:
    config = json.loads((source.folder / "config.json").read_text())["quantization_config"]
    return read_config(config).linear(source, NAME, SHAPE, bias)


@pytest.mark.parametrize("name", TERMS)
def test_every_family_comes_back(name: str, tmp_path: Path) -> None:
    """Bug: a part that is stored under a name nobody reads, a factor or a zero point forgotten."""
    source = write(tmp_path, LinearWeights((TERMS[name],)))
    weights = read(source)
    assert torch.equal(weights.dequantize(), TERMS[name].dequantize())
    assert [term.family for term in weights.terms] == [TERMS[name].family]
    source.check_all_read()


def test_powers_of_two_take_a_byte(tmp_path: Path) -> None:
    """Bug: MXINT8 in 8.5 bits."""
    write(tmp_path, LinearWeights((shared_zero(),)))
    stored = load_file(tmp_path / "model.safetensors")
    assert stored[f"{NAME}.terms.0.scales"].dtype == torch.float8_e8m0fnu
    assert set(stored) == {f"{NAME}.terms.0.scales", f"{NAME}.terms.0.codes"}


def test_sums_of_terms_between_transforms_come_back(tmp_path: Path) -> None:
    """Bug: a second term or transform that overwrites the first; the order of transforms lost."""
    random = torch.Generator().manual_seed(5)
    pre = (
        Permutation(torch.randperm(96, generator=random)),
        Diagonal(torch.randn(96, generator=random).half()),
        BlockRotation(torch.randn(3, 32, 32, generator=random)),
        Hadamard(16),
    )
    post = (BlockRotation(torch.randn(1, 4, 4, generator=random)), Diagonal(torch.randn(24, generator=random)))
    terms = (TERMS["table ternary"], TERMS["lowrank"], TERMS["sparse"])
    weights = LinearWeights(terms, pre, torch.randn(24, generator=random), post)
    source = write(tmp_path, weights)
    found = read(source, bias=True)
    assert torch.equal(found.dequantize(), weights.dequantize())
    assert found.bias is not None
    assert weights.bias is not None
    assert torch.equal(found.bias, weights.bias)
    assert found.describe() == weights.describe()
    source.check_all_read()


def test_a_book_may_be_shared(tmp_path: Path) -> None:
    """Bug: 1 MiB of the same vectors beside every layer."""
    term = TERMS["codebook 16 bits"]
    assert isinstance(term, CodebookWeights)
    source = write(tmp_path, LinearWeights((term,)), lambda t: t.update({"book": t.pop(f"{NAME}.terms.0.book")}))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config["schemes"]["0"]["terms"][0]["book"] = "book"
    found = read_config(config).linear(source, NAME, SHAPE, False)
    assert torch.equal(found.dequantize(), term.dequantize())


def test_modules_that_are_not_listed_are_dense(tmp_path: Path) -> None:
    head = torch.randn(8, 96).half()
    source = write(tmp_path, LinearWeights((TERMS["affine"],)), lambda t: t.update({"lm_head.weight": head}))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    found = read_config(config).linear(source, "lm_head", (8, 96), False)
    assert torch.equal(found.dequantize(), head.float())


PLAIN: dict[str, Any] = {
    "quant_method": "nibble",
    "version": 1,
    "schemes": {
        "0": {"terms": [{"family": "affine", "bits": 4, "group_size": 32}], "pre": [{"kind": "hadamard", "block": 8}]}
    },
    "modules": {NAME: "0"},
}


def altered(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    config = copy.deepcopy(PLAIN)
    change(config)
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2 is not supported"),
        (lambda c: c.pop("version"), "version None"),
        (lambda c: c.update(kv_cache="k2"), "`kv_cache`"),
        (lambda c: c["schemes"]["0"].update(activations="int8"), "`activations`"),
        (lambda c: c["schemes"]["0"]["terms"][0].update(rank=4), "`rank`"),
        (lambda c: c["schemes"]["0"]["terms"][0].update(family="trellis"), "'trellis'"),
        (lambda c: c["schemes"]["0"]["terms"][0].pop("bits"), "`bits`"),
        (lambda c: c["schemes"]["0"]["pre"][0].update(seed=1), "`seed`"),
        (lambda c: c["schemes"]["0"]["pre"][0].update(kind="fourier"), "'fourier'"),
        (lambda c: c["modules"].update(lm_head="9"), "'lm_head' names the scheme '9'"),
        (lambda c: c["schemes"]["0"].update(terms=[]), "scheme '0' has no terms"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: Callable[[dict[str, Any]], object], message: str) -> None:
    """Bug: a field of a later version that is skipped, and other weights served than the file means."""
    with pytest.raises(FormatRefused, match=message):
        read_config(altered(change))


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("scales", torch.full((24, 3), float("nan")), "scales' holds a value that is not finite"),
        ("scales", torch.ones(24, 4), r"scales' has shape \[24, 4\], expected \[24, 3\]"),
        ("codes", torch.zeros(24, 47, dtype=torch.uint8), r"codes' has shape \[24, 47\], expected \[24, 48\]"),
        ("codes", torch.zeros(24, 48, dtype=torch.int8), "codes' has dtype int8"),
        ("zeros", torch.zeros(24, 3, dtype=torch.int64), "zeros' has dtype int64"),
    ],
)
def test_damaged_tensors_are_named(part: str, tensor: Tensor, message: str, tmp_path: Path) -> None:
    source = write(tmp_path, LinearWeights((TERMS["affine"],)), lambda t: t.update({f"{NAME}.terms.0.{part}": tensor}))
    with pytest.raises(TensorError, match=message):
        read(source)


def test_what_makes_no_weights_is_named(tmp_path: Path) -> None:
    """Bug: the kernels' own errors, which do not say in which of 200 layers; a channel named twice."""

    def far(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.terms.0.columns"] += 96

    with pytest.raises(TensorError, match=r"q_proj' make no weights: columns must lie in 0\.\.95"):
        read(write(tmp_path, LinearWeights((TERMS["sparse"],)), far))
    twice = LinearWeights((TERMS["affine"],), (Permutation(torch.zeros(96, dtype=torch.int64)),))
    with pytest.raises(TensorError, match=r"pre\.0\.index' does not name every one of 96 channels once"):
        read(write(tmp_path, twice))
    with pytest.raises(FormatRefused, match="96 channels are not whole Hadamard blocks of 64"):
        read(write(tmp_path, LinearWeights((TERMS["affine"],), (Hadamard(64),))))


JUNK: tuple[Any, ...] = (None, True, -1, 0, 7, 10**30, 1e300, "", "../x", [], [[1]], {}, {"x": {"y": [None]}}, ["(", 3])


def with_junk(config: Any) -> Iterator[Any]:
    """The config with each of its values, at any depth, replaced by each piece of junk."""
    keys = config if isinstance(config, dict) else range(len(config)) if isinstance(config, list) else ()
    for key in keys:
        for value in (*JUNK, *with_junk(config[key])):
            changed = copy.copy(config)
            changed[key] = value
            yield changed


def test_no_config_ends_in_another_error_than_a_refusal(tmp_path: Path) -> None:
    """Bug: a group size of 10^30 that overflows in a kernel, a zero point of 1e300, a name that is a list."""
    term = TERMS["codebook 16 bits"]
    weights = LinearWeights((shared_zero(), term, TERMS["table nvfp4"], TERMS["lowrank"]), (Hadamard(16),))
    source = write(tmp_path, weights)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    tried = 0
    for junk in with_junk(config):
        tried += 1
        with suppress(FormatRefused, TensorError):
            read_config(junk).linear(source, NAME, SHAPE, False).dequantize()
    assert tried > 300
