"""nibble calibrate on models of two layers: what it finds serves them, and is better than what it replaces."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from engine.assembly import build
from engine.batch import BatchRow, build_batch
from engine.calibration.attention import Head, heads_of
from engine.calibration.record import Recorded, record
from engine.calibration.run import calibrate
from engine.calibration.search import Side, search, uncalibrated
from engine.config import EngineConfig, resolve
from engine.loading import load_model, model_facts, open_checkpoint
from engine.messages import CalibrationSettings
from engine.models.decoder import Decoder
from kernels.attention.quantized.cache import KeyShift, LayerCodec, QuantizedCache, recent_page_shape
from kernels.attention.quantized.codec import RowCodec
from kernels.attention.quantized.layout import ChunkLayout, RowLayout
from kernels.attention.quantized.reference import QuantizedReference
from kernels.attention.quantized.transforms import Chain, Hadamard, Permutation
from kernels.contract import AttentionInputs
from kvcache.calibration import FILE_NAME, read_calibration
from tests.engine.artifacts import random_calibration
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES

POLICY = "skvq:k2v2:g16:w8:s2"
LENGTH = 96  # tokens of a text
D, H, G = 32, 2, 2
STORIES = Path(__file__).parents[1] / "fixtures/gguf/stories260k.gguf"
WORDS = [f"w{i}" for i in range(SIZES["vocab_size"] - 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of one token a word."""
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, LlamaConfig(**SIZES, head_dim=D))
    tokenizer = Tokenizer(models.WordLevel({"?": 0} | {word: i + 1 for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer).save_pretrained(made)
    return made


def text_of(folder: Path, num_tokens: int = 4 * LENGTH) -> Path:
    path = folder / "text.txt"
    path.write_text(" ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(num_tokens)))
    return path


def settings(folder: Path, to: Path, **changes: Any) -> CalibrationSettings:
    made = CalibrationSettings(str(folder), str(text_of(folder)), POLICY, str(to))
    return msgspec.structs.replace(made, **changes)


def test_what_is_found_serves_the_model(folder: Path, tmp_path: Path) -> None:
    """Bug: a command whose file the engine does not take; a search that makes a layer worse."""
    report = calibrate(settings(folder, tmp_path / FILE_NAME))
    assert [layer.widths for layer in report.layers] == ["k2v2", "k2v2"]
    assert all(layer.error_after <= layer.error_before for layer in report.layers)
    assert report.provenance == f"4 x {LENGTH} tokens of text.txt"
    config = EngineConfig(str(folder), kv_policy=POLICY, kv_calibration=report.artifact)
    core, plan = build(config)
    assert any(report.digest[:8] in note for note in plan.notes)
    assert core.parts.storage.layout.calibration is not None


def test_the_same_text_gives_the_same_artifact(folder: Path, tmp_path: Path) -> None:
    """Bug: a search that nobody can repeat."""
    digests = [calibrate(settings(folder, tmp_path / name)).digest for name in ("a", "b")]
    assert digests[0] == digests[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_layers_of_other_widths_are_left_alone(folder: Path, tmp_path: Path) -> None:
    report = calibrate(settings(folder, tmp_path / "cal", policy=f"{POLICY}/0=f16"))
    assert (report.layers[0].widths, report.layers[0].keys, report.layers[1].widths) == ("f16", "", "k2v2")
    assert report.layers[0].error_after == report.layers[0].error_before == 0
    config = EngineConfig(str(folder), kv_policy=f"{POLICY}/0=f16", kv_calibration=report.artifact)
    assert build(config)[1].kv_policy == f"{POLICY}/0=f16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "f16"}, "f16 needs no calibration: name one that does, such as skvq:k2v2"),
        ({"policy": "k4v4"}, "k4v4:w128:s4 needs no calibration"),
        ({"policy": "skvq:k2v2:g16/0=skvq:k2v2:g8"}, r"has groups of \[8, 16\]: an artifact holds one size"),
        ({"policy": "skvq:k2v2:g48"}, "cannot serve this model"),
        ({"policy": "skvq:k2v2:g16"}, "quantizes nothing of 128 tokens, the model's context"),
        (
            {"num_tokens": 200},
            r"text.txt gives 200 tokens, and 4 texts of 74 are needed: use a longer file, raise --to",
        ),
        ({"data": "nowhere.txt"}, "the text nowhere.txt cannot be read: No such file"),
        ({"out": "/nowhere/kvcal"}, "/nowhere/kvcal cannot be written: /nowhere is no folder that can be written to"),
    ],
)
def test_what_cannot_be_calibrated_is_named(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(settings(folder, tmp_path / "cal", **changes))


def test_a_gguf_file_is_calibrated_with_its_own_tokenizer(tmp_path: Path) -> None:
    """Bug: a tokenizer looked for beside the file, or an artifact that the model it was made for does not take."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl named Lily. " * 40)
    policy, out = "skvq:k4v4:g8:w8:s2", str(tmp_path / "cal")
    report = calibrate(CalibrationSettings(str(STORIES), str(text), policy, out, 4 * LENGTH))
    assert report.provenance == f"4 x {LENGTH} tokens of text.txt"
    assert all(layer.error_after < layer.error_before for layer in report.layers)
    core, _ = build(EngineConfig(str(STORIES), kv_policy=policy, kv_calibration=out, kv_memory=4 << 20, max_num_seqs=2))
    assert core.parts.storage.layout.calibration is not None


def test_a_model_without_a_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    """Bug: "text.txt gives 0 tokens", of a tokenizer that a library made of nothing."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="copy has no tokenizer: put the model's tokenizer"):
        calibrate(settings(folder, tmp_path / "cal", model=str(copy)))


def test_text_that_is_not_text_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="noise cannot be read: it is not UTF-8 text"):
        calibrate(settings(folder, tmp_path / "cal", data=str(tmp_path / "noise")))


def loaded(folder: Path) -> Decoder:
    checkpoint = open_checkpoint(folder)
    config = EngineConfig(str(folder), kv_policy="f32", kernel="reference", head_bits=16)
    return load_model(checkpoint, resolve(config, model_facts(checkpoint, config))).model


def test_recorded_layers_are_those_of_the_model(folder: Path) -> None:
    """Bug: a chunk's keys lost, or a layer that reads another layer's stream."""
    model, text = loaded(folder), [3 * i % 97 for i in range(40)]
    whole, cut = (list(record(model, [text], chunk)) for chunk in (64, 16))
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one[0].queries, other[0].queries)
        assert torch.equal(one[0].keys, other[0].keys)
        assert torch.equal(one[0].values, other[0].values)
    assert len(whole) == 2
    assert not torch.equal(whole[0][0].keys, whole[1][0].keys)


def recorded(seed: int, outliers: float = 1.0, shift: float = 0.0) -> Recorded:
    """Attention that looks for something; one pair of channels of the keys times `outliers`, of queries divided by it,
    and another channel moved by `shift`: what attention gives is the same for all of them."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(LENGTH, heads, D, generator=generator) for heads in (G * H, H, H))
    k[..., 3::16] *= outliers
    q[..., 3::16] /= outliers
    k[..., 5] += shift
    return Recorded(2 * q, k, v)


def side(texts: list[Recorded], is_keys: bool = True) -> Side:
    generator = torch.Generator().manual_seed(0)
    heads: list[list[Head]] = [heads_of(text, 8, 2, generator) for text in texts]
    return Side(heads[:3], heads[3:], RowLayout(2.0, D, 16), is_keys)


@pytest.mark.parametrize(("outliers", "shift"), [(1.0, 40.0), (16.0, 0.0), (16.0, 40.0)])
def test_outliers_that_attention_does_not_notice_are_recovered(outliers: float, shift: float) -> None:
    """Bug: a calibration that only chooses clips. A mean and a scale of their own take such channels away, so that not
    more is lost than without them; plain groups and rotated ones lose many times that."""
    clean, spoilt = (side([recorded(i, *args) for i in range(4)]) for args in ((), (outliers, shift)))
    expected = float(clean.errors(search(clean), clean.held_out).sum())
    found = float(spoilt.errors(search(spoilt), spoilt.held_out).sum())
    lost = float(spoilt.errors(uncalibrated(spoilt), spoilt.held_out).sum())
    assert lost > 2 * expected
    assert found < expected + 0.25 * (lost - expected)


def test_values_are_searched_with_their_own_errors() -> None:
    """Bug: values judged as if they were keys."""
    text = [recorded(i) for i in range(4)]
    for one in text:
        one.values[..., 7::8] *= 20  # four channels that fill a group of their own once sorted
    values = side(text, is_keys=False)
    best = values.errors(search(values), values.held_out).sum()
    assert best < values.errors(uncalibrated(values), values.held_out).sum()


class Unquantized:
    """Every transform of an artifact, in 16 bits."""

    def __init__(self, codec: LayerCodec) -> None:
        layout = RowLayout(16.0, D, 16)
        rows = RowCodec(layout, torch.ones(H, 0), torch.ones(H))
        self.codec = replace(codec, keys=rows, values=rows)
        self.chunk = ChunkLayout(layout, layout, 16)

    def cache(self, num_pages: int) -> QuantizedCache:
        pages = torch.zeros(num_pages, H, self.chunk.chunk_bytes, dtype=torch.uint8)
        return QuantizedCache(self.codec, self.chunk, pages, torch.zeros(num_pages, *recent_page_shape(H, D)))


def outputs(codec: LayerCodec, text: Recorded) -> Tensor:
    """Attention over float16 rows under `codec`'s transforms."""
    num_pages = -(-LENGTH // 16)
    batch = build_batch([BatchRow([0] * LENGTH, 0, list(range(num_pages)), 16, 0)])
    inputs: AttentionInputs = batch.attention
    cache, kernel = Unquantized(replace(codec, window=0, num_sinks=0)).cache(num_pages), QuantizedReference()
    kernel.store(text.keys, text.values, cache, inputs)
    return kernel.attend(text.queries, cache, inputs, D**-0.5)


def test_what_an_artifact_does_before_quantizing_leaves_attention_as_it_is(folder: Path) -> None:
    """Bug: queries that turn otherwise than keys, or a mean that does not cancel.

    The bound: with float16 rows a score q . k scale, k off by 2^-11 of itself at most, moves by
    e = 2^-11 scale max |q| max |k'| in either computation, and an output by at most (exp(2 e) - 1 + 2^-11) max |v|,
    where k' and v' are what is stored; a norm is never less than a channel.
    """
    generator = torch.Generator().manual_seed(3)
    order = torch.rand(2, H, D, generator=generator).argsort(-1)
    shift = KeyShift(
        3 * torch.randn(H, D, generator=generator), torch.exp2(torch.randint(-2, 3, (H, D), generator=generator))
    )
    rows = RowCodec(RowLayout(16.0, D, 16), torch.ones(H, 0), torch.ones(H))
    turned = LayerCodec(rows, rows, Chain((Permutation(order[0]), Hadamard())), Permutation(order[1]), 0, 0, shift)
    plain = replace(turned, key_transform=Permutation(torch.arange(D).expand(H, D)), key_shift=None)
    plain = replace(plain, value_transform=plain.key_transform)
    text = recorded(0)
    error = 0.0
    for codec in (plain, turned):
        norms = [x.norm(dim=-1).amax() for x in (codec.prepare_queries(text.queries), codec.prepare_keys(text.keys))]
        error += 2.0**-11 * D**-0.5 * float(norms[0] * norms[1])
    bound = (torch.tensor(2 * error).expm1() + 2.0**-11) * text.values.norm(dim=-1).amax()
    assert float((outputs(turned, text) - outputs(plain, text)).abs().max()) < float(bound)


def test_an_artifact_is_read_back_whole(folder: Path, tmp_path: Path) -> None:
    report = calibrate(settings(folder, tmp_path / "cal"))
    name = random_calibration(folder, POLICY).header.fingerprint
    found = read_calibration(tmp_path / "cal", name)
    assert found.digest == report.digest
    assert found.header.window == 8
    assert found.header.num_sinks == 2
