"""What quantizing does to attention outputs, layer by layer, and codecs made of single ingredients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.kv_quality.scoring import Engine, mean
from engine.calibration.attention import Head, heads_of
from engine.calibration.record import Recorded, record
from engine.calibration.search import CLIPS, Quantizer, Side, candidates
from kernels.attention.quantized.cache import KeyShift, LayerCodec, QuantizedCache
from kernels.attention.quantized.codec import RowCodec
from kernels.attention.quantized.layout import RowLayout
from kvcache.policy import LayerPolicy

CHUNK = 512  # tokens of a step


@dataclass(frozen=True)
class Variant:
    """Which ingredients a codec has."""

    keys: str  # a candidate of engine.calibration.search
    values: str
    clip: bool  # searched, one for a head; else none
    centred: bool = False  # the mean of keys taken off

    @property
    def name(self) -> str:
        order = {"sorted": "reorder"}
        parts = [order.get(self.keys, self.keys)] if self.keys != "plain" else []
        parts += ["clip"] if self.clip else []
        parts += ["mean"] if self.centred else []
        return " + ".join(parts) or "plain"


VARIANTS = (
    Variant("plain", "plain", clip=False),
    Variant("plain", "plain", clip=True),
    Variant("sorted", "sorted", clip=False),
    Variant("sorted", "sorted", clip=True),
    Variant("hadamard", "hadamard", clip=False),
    Variant("hadamard", "hadamard", clip=True),
    Variant("hadamard", "hadamard", clip=True, centred=True),
    Variant("scaled hadamard", "hadamard", clip=True, centred=True),
)

Layers = list[list[Recorded]]  # [layer][text]


def recorded(engine: Engine, texts: Sequence[list[int]]) -> Layers:
    """Queries, keys and values of every layer of a model over float32 pages."""
    return list(record(engine.model, texts, CHUNK))


def scaled(layers: Layers, keys: Tensor, values: Tensor) -> Layers:
    """The same with outliers that attention does not notice. keys, values: [D]"""
    return [
        [Recorded(text.queries / keys, text.keys * keys, text.values * values) for text in texts] for texts in layers
    ]


def heads(texts: Sequence[Recorded], layer: LayerPolicy) -> list[list[Head]]:
    """Rows of every text that read anything quantized."""
    generator = torch.Generator().manual_seed(0)
    return [heads_of(text, layer.window, layer.num_sinks, generator) for text in texts]


def output_error(engine: Engine, layers: Layers, undo: Tensor | None = None) -> float:
    """Mean over layers of |o' - o|^2 / |o|^2 with the engine's codecs; layers of floating point count nothing.

    undo: [D], what outputs are multiplied by before they are compared, where values are scaled.
    """
    found = []
    for index, cache in enumerate(engine.storage.layers):
        if not isinstance(cache, QuantizedCache):
            found.append(0.0)
            continue
        total = size = 0.0
        for text in heads(layers[index], engine.layout.layers[index]):
            keys, values = read(cache.codec, text)
            if undo is not None:
                values = values * undo
            judged = [head if undo is None else _undone(head, undo) for head in text]
            total += sum(head.error(keys[:, i], values[:, i]) for i, head in enumerate(judged))
            size += sum(head.size for head in judged)
        found.append(total / size)
    return mean(found)


def _undone(head: Head, undo: Tensor) -> Head:
    return replace(head, values=head.values * undo, output=head.output * undo)


def read(codec: LayerCodec, text: Sequence[Head]) -> tuple[Tensor, Tensor]:
    """Keys and values as packed pages give them back: [num_tokens, num_kv_heads, D] each."""
    keys, values = (torch.stack([getattr(head, name) for head in text], dim=1) for name in ("keys", "values"))
    turned = codec.key_transform.apply(codec.prepare_keys(keys))
    read_keys = codec.key_transform.invert(codec.keys.decode(*codec.keys.encode(turned)))
    if codec.key_shift is not None:
        read_keys = read_keys / codec.key_shift.scale + codec.key_shift.offset
    turned = codec.value_transform.apply(values)
    return read_keys, codec.value_transform.invert(codec.values.decode(*codec.values.encode(turned)))


def codecs(variant: Variant, layers: Layers, policies: Sequence[LayerPolicy]) -> tuple[LayerCodec, ...]:
    """What the variant makes of the texts to fit."""
    return tuple(_codec(variant, texts, layer) for texts, layer in zip(layers, policies, strict=True))


def _codec(variant: Variant, texts: Sequence[Recorded], layer: LayerPolicy) -> LayerCodec:
    fit = heads(texts, layer)
    head_dim = texts[0].keys.shape[2]
    made = []
    for bits, name, is_keys in ((layer.key_bits, variant.keys, True), (layer.value_bits, variant.values, False)):
        side = Side(fit, fit, RowLayout(bits, head_dim, layer.group_size), is_keys)
        chosen = next(one for one in candidates(side) if one.name == name)
        if not variant.centred:
            chosen = replace(chosen, mean=torch.zeros_like(chosen.mean))
        made.append(_clipped(side, chosen) if variant.clip else chosen)
    return _joined(made[0], made[1], layer)


def _clipped(side: Side, quantizer: Quantizer) -> Quantizer:
    """The clip of each head that moves attention outputs least."""

    def with_clip(clips: Tensor) -> Quantizer:
        """clips: [num_kv_heads]"""
        codec = quantizer.codec
        return replace(quantizer, codec=replace(codec, clip=clips[:, None].expand_as(codec.clip).contiguous()))

    num_heads = quantizer.codec.num_heads
    tried = torch.stack([side.errors(with_clip(torch.full((num_heads,), clip)), side.fit) for clip in CLIPS])
    return with_clip(torch.tensor(CLIPS)[tried.argmin(0)])


def _joined(keys: Quantizer, values: Quantizer, layer: LayerPolicy) -> LayerCodec:
    shifted = bool((keys.mean != 0).any()) or bool((keys.scale != 1).any())
    shift = KeyShift(keys.mean, keys.scale) if shifted else None
    return LayerCodec(keys.codec, values.codec, keys.turn, values.turn, layer.window, layer.num_sinks, shift)


def order_of_rounding(x: Tensor, codec: RowCodec) -> float:
    """Squared error of this codec over that of SKVQ's published order, which takes codes from the exact scale and zero
    and rounds both only to store them. The same groups, clip and e4m3 parameters.  x: [num_tokens, num_kv_heads, D]"""
    ours = (codec.decode(*codec.encode(x)) - x).square().sum()
    layout, prescale = codec.layout, codec.prescale[:, None]
    grouped = x.view(*x.shape[:2], layout.num_groups, layout.group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    middle, half = (low + high) / 2, (high - low) / 2 * codec.clip
    scale, zero = 2 * half / layout.max_code / prescale, (middle - half) / prescale
    codes = ((grouped / prescale[..., None] - zero[..., None]) / scale[..., None]).clamp(0, layout.max_code).round()
    stored_scale, stored_zero = (part.to(layout.parameter_dtype).float() for part in (scale, zero))
    published = (codes * stored_scale[..., None] + stored_zero[..., None]) * prescale[..., None]
    return float(ours / (published - grouped).square().sum())
