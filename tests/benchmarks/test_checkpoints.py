"""Checkpoints with random weights, and our side of a comparison."""

from pathlib import Path

import pytest

from benchmarks.checkpoints import Affine, Ternary, Weights, write_checkpoint
from benchmarks.peers.nibble import Nibble, prepare
from benchmarks.peers.protocol import Refused, Setup, Work
from benchmarks.shapes import SHAPES, SMALLEST, Shape
from engine.loading import open_checkpoint

BIASED = Shape(128, 128, 1, 2, 1, 64, 128, tied=True, qkv_bias=True)
DECODE = Work(prefill=0, batch=2, context=4, tokens=2)


@pytest.mark.parametrize("shape", [SMALLEST, BIASED])
@pytest.mark.parametrize(
    "weights", [Affine(2, 32), Affine(4, 32), Affine(4, 32, symmetric=False), Affine(8, 32), Ternary()]
)
def test_matrices_have_the_bits_they_claim(tmp_path: Path, shape: Shape, weights: Weights) -> None:
    """Bug: a comparison at equal bits whose bits are not equal."""
    num_bytes = write_checkpoint(tmp_path, shape, weights)
    expected = shape.layer_weights * weights.bits_per_weight / 8
    dense = 2 * (shape.vocab * shape.hidden + shape.hidden * (1 + 2 * shape.num_layers))
    biases = 2 * sum(shape.linears()[role][0] for role in "qkv") if shape.qkv_bias else 0
    each = 2 if isinstance(weights, Ternary) else 16  # bytes of weight_scale [1], or of weight_shape [2]
    sizes = 7 * shape.num_layers * each
    assert num_bytes == expected + dense + biases + sizes
    assert open_checkpoint(tmp_path).config.qkv_bias == shape.qkv_bias


@pytest.mark.parametrize("work", [DECODE, Work(prefill=6, batch=1, context=0, tokens=0)])
def test_our_side_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    """Bug: tokens counted that were not computed, or sequences that share their pages."""
    monkeypatch.setitem(SHAPES, "smallest", SMALLEST)
    setup = Setup("smallest", None, 4, "", "f16", 1, str(tmp_path), work)
    prepare(setup)
    model = Nibble(setup)
    seconds, tokens = model.measure()
    assert seconds > 0
    assert tokens == (work.prefill or work.batch * work.tokens)
    assert 4.5 <= model.facts["bits_per_weight"] < 5  # a factor for each row beside them: much on rows this short


def test_formats_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    """Bug: 3.5 bits silently measured as 4."""
    with pytest.raises(Refused, match=r"3\.5 bits"):
        prepare(Setup("llama-3.2-1b", 1, 3.5, "", "f16", 1, str(tmp_path), DECODE))
    with pytest.raises(Refused, match="g99"):
        prepare(Setup("llama-3.2-1b", 1, 4, "g99", "f16", 1, str(tmp_path), DECODE))
