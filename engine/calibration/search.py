"""The quantizer of one layer's keys, or values, that disturbs attention least.

Candidates differ in what is done to a head before it is quantized:

    keys      their mean over tokens is taken off (attention does not notice); then
    turn      nothing, the Hadamard rotation, or channels sorted by their standard deviation, so that those of a like
              range share a group
    scale     for keys, once as they are and once with sqrt(rms of queries / deviation of keys), to a power of two,
              multiplied into every channel: the error then falls where queries look least

For each, one clip a head is searched, and from there one for every group; both by the attention output error on texts
to fit. Texts held out then choose the candidate and whether groups keep clips of their own. When the codec of an
uncalibrated cache does better on those, it is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.calibration.attention import Head
from kernels.attention.quantized.codec import RowCodec, default_clip, prescale_for
from kernels.attention.quantized.layout import RowLayout
from kernels.attention.quantized.transforms import Hadamard, HeadTransform, Identity, Permutation

CLIPS = tuple(1 - i / 16 for i in range(9))  # 1 to 0.5, exact in float16
NEIGHBOURS = (-1 / 16, 1 / 16)  # what a group may differ by from its head
UNCALIBRATED = "uncalibrated"

Texts = Sequence[Sequence[Head]]  # [text][kv head]


@dataclass(frozen=True)
class Quantizer:
    """One layer's keys or values: x' = turn((x - mean) scale), quantized."""

    name: str  # for the report
    codec: RowCodec
    turn: HeadTransform
    mean: Tensor  # [num_kv_heads, D]
    scale: Tensor  # [num_kv_heads, D]

    def read(self, x: Tensor) -> Tensor:
        """x: [num_tokens, num_kv_heads, D] -> what a packed page gives for it."""
        turned = self.turn.apply((x - self.mean) * self.scale)
        if self.codec.layout.bits == 16:
            return x
        codes, scales, zeros = self.codec.quantize(turned)
        return self.turn.invert(self.codec.dequantize(codes, scales.float(), zeros.float())) / self.scale + self.mean


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer: what is measured, and how they are stored."""

    fit: Texts
    held_out: Texts
    layout: RowLayout
    is_keys: bool

    def stack(self, text: Sequence[Head]) -> Tensor:
        """[num_tokens, num_kv_heads, D]"""
        return torch.stack([head.keys if self.is_keys else head.values for head in text], dim=1)

    def errors(self, quantizer: Quantizer, texts: Texts) -> Tensor:
        """Of each kv head, [num_kv_heads] float64."""
        totals = torch.zeros(len(texts[0]), dtype=torch.float64)
        for text in texts:
            read = quantizer.read(self.stack(text))
            for i, head in enumerate(text):
                given = (read[:, i], None) if self.is_keys else (None, read[:, i])
                totals[i] += head.error(*given)
        return totals


def search(side: Side) -> Quantizer:
    """The best candidate on the texts held out."""
    best = uncalibrated(side)
    if side.layout.bits == 16:
        return best
    least = float(side.errors(best, side.held_out).sum())
    for candidate in candidates(side):
        uniform = _search_heads(side, candidate)
        for found in (uniform, _search_groups(side, uniform)):
            error = float(side.errors(found, side.held_out).sum())
            if error < least:
                best, least = found, error
    return best


def uncalibrated(side: Side) -> Quantizer:
    """What serves a model without an artifact, with prescales of its own."""
    rms = torch.cat([side.stack(text) for text in side.fit]).square().mean((0, 2)).sqrt()
    num_kv_heads, head_dim = len(rms), side.layout.head_dim
    clip = torch.full((num_kv_heads, side.layout.num_groups), default_clip(side.layout.bits, side.layout.group_size))
    codec = RowCodec(side.layout, clip, _prescales(rms))
    zeros = torch.zeros(num_kv_heads, head_dim)
    return Quantizer(UNCALIBRATED, codec, Hadamard(), zeros, torch.ones_like(zeros))


def candidates(side: Side) -> list[Quantizer]:
    """Without clips yet."""
    held = torch.cat([side.stack(text) for text in side.fit])  # [tokens, num_kv_heads, D]
    mean = held.mean(0) if side.is_keys else torch.zeros(held.shape[1:])
    deviation = (held - mean).square().mean(0).sqrt()  # [num_kv_heads, D]
    ones = torch.ones_like(deviation)
    wanted: list[tuple[str, HeadTransform, Tensor]] = [
        ("plain", Identity(), ones),
        ("hadamard", Hadamard(), ones),
        ("sorted", Permutation(deviation.argsort(-1)), ones),
    ]
    if side.is_keys:
        scale = _scale(side, deviation)
        wanted += [("scaled", Identity(), scale), ("scaled hadamard", Hadamard(), scale)]
    clip = torch.ones(len(mean), side.layout.num_groups)
    made = []
    for name, turn, scale in wanted:
        rms = ((held - mean) * scale).square().mean((0, 2)).sqrt()
        codec = RowCodec(side.layout, clip, _prescales(rms))
        made.append(Quantizer(name, codec, turn, mean, scale))
    return made


def _scale(side: Side, deviation: Tensor) -> Tensor:
    """Powers of two next to sqrt(rms of queries / deviation of keys), around 1 in each head."""
    squares = [[head.queries.square().mean(0) for head in text] for text in side.fit]
    queries = torch.stack([torch.stack(text) for text in squares]).mean(0).sqrt()  # [num_kv_heads, D]
    tiny = 1e-3
    ratio = 0.5 * torch.log2((queries / queries.amax(-1, True) + tiny) / (deviation / deviation.amax(-1, True) + tiny))
    return torch.exp2((ratio - ratio.mean(-1, True)).round())


def _prescales(rms: Tensor) -> Tensor:
    return torch.tensor([prescale_for(float(value)) if float(value) > 0 else 1.0 for value in rms])


def _search_heads(side: Side, quantizer: Quantizer) -> Quantizer:
    """One clip for all groups of a head."""
    clips = quantizer.codec.clip
    tried = [_with_clips(quantizer, torch.full_like(clips, clip)) for clip in CLIPS]
    errors = torch.stack([side.errors(one, side.fit) for one in tried])  # [num_clips, num_kv_heads]
    best = torch.tensor(CLIPS)[errors.argmin(0)]
    return _with_clips(quantizer, best[:, None].expand_as(clips).contiguous())


def _search_groups(side: Side, quantizer: Quantizer) -> Quantizer:
    """Group after group, a step up or down where that helps its head."""
    clips = quantizer.codec.clip.clone()
    least = side.errors(quantizer, side.fit)  # [num_kv_heads]
    for group in range(clips.shape[1]):
        for step in NEIGHBOURS:
            tried = clips.clone()
            tried[:, group] = (quantizer.codec.clip[:, group] + step).clamp(CLIPS[-1], 1)
            errors = side.errors(_with_clips(quantizer, tried), side.fit)
            better = errors < least
            clips[better], least = tried[better], torch.minimum(least, errors)
    return replace(_with_clips(quantizer, clips), name=f"{quantizer.name}, by group")


def _with_clips(quantizer: Quantizer, clips: Tensor) -> Quantizer:
    return replace(quantizer, codec=replace(quantizer.codec, clip=clips))
