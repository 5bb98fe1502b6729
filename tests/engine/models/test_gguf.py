"""Settings of a GGUF file that no model can be made of."""

from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.gguf_file import Settings
from engine.models.config import UnsupportedModel
from engine.models.gguf import describe

SETTINGS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.feed_forward_length": 128,
    "llama.block_count": 2,
    "llama.context_length": 256,
}
SHAPES = {"token_embd.weight": (99, 64)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.attention.layer_norm_rms_epsilon": -1e-5}, "layer_norm_rms_epsilon must be at least 0, found -1e-05"),
        ({"llama.rope.freq_base": 1.0}, "rope_theta of RoPE must be more than 1, .* found 1.0"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, "factor of RoPE must be more than 0"),
        ({"llama.block_count": 0}, "block_count must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """Bug: answers of NaN, or a traceback from inside the model."""
    assert describe(Settings(Path("m.gguf"), SETTINGS), SHAPES, ()).config.num_layers == 2
    with pytest.raises(UnsupportedModel, match=message):
        describe(Settings(Path("m.gguf"), SETTINGS | changes), SHAPES, ())
