"""Names of cache policies: what they mean for each layer, how they print, what they refuse."""

import itertools

import pytest

from kernels.attention.quantized.layout import WIDTHS
from kvcache.policy import (
    CALIBRATED,
    HADAMARD,
    PLAIN,
    LayerPolicy,
    PolicyError,
    default_group_size,
    read_policy,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k8v8", LayerPolicy(8, 8, 64, 128, 4, HADAMARD)),
        ("k4v4", LayerPolicy(4, 4, 64, 128, 4, HADAMARD)),
        ("skvq:k4v2", LayerPolicy(4, 2, 64, 128, 4, HADAMARD)),
        ("skvq:k3v2:w0", LayerPolicy(3, 2, 64, 0, 4, HADAMARD)),
        ("skvq:k2v2:s0:w32:g32", LayerPolicy(2, 2, 32, 32, 0, HADAMARD)),
        ("skvq:k2v1.5:g128", LayerPolicy(2, 1.5, 128, 128, 4, HADAMARD)),
        ("k16v2:plain", LayerPolicy(16, 2, 64, 128, 4, PLAIN)),
        ("f16", LayerPolicy(16, 16, 0, 0, 0, PLAIN)),
        ("f32", LayerPolicy(32, 32, 0, 0, 0, PLAIN)),
    ],
)
def test_names_mean_what_the_documentation_says(text: str, expected: LayerPolicy) -> None:
    assert read_policy(text).layers(num_layers=2, head_dim=128) == (expected, expected)


def test_only_skvq_takes_an_artifact() -> None:
    """Bug: k4v4 that changes when a file appears beside the checkpoint."""
    assert read_policy("skvq:k4v4").layers(1, 128, has_artifact=True)[0].transform == CALIBRATED
    assert read_policy("k4v4").layers(1, 128, has_artifact=True)[0].transform == HADAMARD
    assert read_policy("k4v4:plain").layers(1, 128, has_artifact=True)[0].transform == PLAIN


def test_layers_can_have_other_widths() -> None:
    """Bug: a layer counted from the end that is taken from the front; an override that leaks into its neighbour."""
    layers = read_policy("skvq:k2v2:w64/0,-1=f16/1=k4v4:g32").layers(5, 128)
    assert [(layer.key_bits, layer.group_size, layer.window) for layer in layers] == [
        (16, 0, 0),
        (4, 32, 64),
        (2, 64, 64),
        (2, 64, 64),
        (16, 0, 0),
    ]


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("k4v4", "k4v4:w128:s4"),
        ("skvq:k2v1.5:s4:w128", "skvq:k2v1.5:w128:s4"),
        ("k4v4:plain:w16:g32", "k4v4:g32:plain:w16:s4"),
        ("k2v2/-1,0=f16/1=k4v4", "k2v2:w128:s4/-1=f16/0=f16/1=k4v4"),
        ("f16", "f16"),
    ],
)
def test_one_policy_prints_alike_however_it_was_spelled(spelling: str, canonical: str) -> None:
    """Bug: two names of one policy are two salts, and pages of one are never found under the other."""
    assert str(read_policy(spelling)) == canonical
    assert read_policy(canonical) == read_policy(spelling)


@pytest.mark.parametrize(("keys", "values"), list(itertools.product(WIDTHS, WIDTHS)))
def test_any_width_goes_with_any_other(keys: float, values: float) -> None:
    text = f"k{keys:g}v{values:g}"
    if keys == values == 16:
        with pytest.raises(PolicyError, match="f16"):
            read_policy(text)
    else:
        assert read_policy(text).layers(1, 64)[0] == LayerPolicy(keys, values, 32, 128, 4, HADAMARD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q9", r"'q9' is not known: use one of f16, f32, kXvY and skvq:kXvY with X and Y of 16, 8, 4, 3, 2, 1.5"),
        ("", r"'' is not known"),
        ("skvq", r"'skvq' is not known"),
        ("skvq:f16", r"'f16' is not known"),
        ("k5v4", r"'k5v4' is not known"),
        ("k4v4:x3", r"option 'x3' is not known: use gN"),
        ("k4v4:g", r"option 'g' is not known"),
        ("k4v4:g64:g32", r"'g32' states one option a second time"),
        ("k4v4:plain:plain", r"a second time"),
        ("k4v4:g0", r"at least one channel"),
        ("k4v4:w513", r": a window of 513 tokens is more than 512; f16"),
        ("k4v4:s65", r": 65 sinks are more than 64"),
        ("skvq:k2v2:plain", r"drop one of them"),
        ("f16:w8", r"f16 has no options, found 'w8'"),
        ("f16/0=k4v4", r"f16 holds for all layers; name a quantized policy first"),
        ("k4v4/0", r"'0' is not of the form 0,-1=k4v4"),
        ("k4v4/a=f16", r"'a=f16' is not of the form"),
        ("k4v4/0=k8v8:w4", r"window and sinks hold for all layers"),
        ("k4v4/0=f16/0=k8v8", r"layer 0 is stated twice"),
        ("k4v4/0=f32", r"layers of full precision are f16"),
    ],
)
def test_bad_names_are_refused_with_what_would_do(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        read_policy(text)


@pytest.mark.parametrize(
    ("text", "head_dim", "message"),
    [
        ("k4v4:g48", 128, r"k4v4:g48 cannot serve this model: groups of 48 do not divide.*groups such as 64"),
        ("k3v2", 80, r"k3v2 cannot serve this model: 3 bits are packed 32.*can have 16, 8, 4, 2, 1.5 bits"),
        ("k4v4/1=k3v3", 80, r"KV cache policy k3v3 cannot serve"),
        ("k4v4/2=f16", 128, r"no layer 2 in a model of 2; use -2 to 1"),
        ("k4v4/1=f16/-1=f16", 128, r"layer -?1 is stated twice"),
    ],
)
def test_policies_that_cannot_serve_a_model_are_refused_by_name(text: str, head_dim: int, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        read_policy(text).layers(2, head_dim)


def test_groups_by_default() -> None:
    assert [default_group_size(dim) for dim in (128, 64, 256, 96, 80, 112, 8)] == [64, 32, 64, 48, 40, 56, 4]
