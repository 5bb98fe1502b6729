"""nibble calibrate: a model and a text -> kvcal.safetensors, and how much nearer attention comes."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.calibration.advice import wider
from engine.calibration.attention import Head, heads_of
from engine.calibration.fingerprint import fingerprint
from engine.calibration.record import PAGE_SIZE, Recorded, record
from engine.calibration.search import Quantizer, Side, search, uncalibrated
from engine.calibration.text import read_texts
from engine.config import EngineConfig, resolve
from engine.loading import Checkpoint, load_model, model_facts, open_checkpoint
from engine.messages import CalibratedLayer, CalibrationReport, CalibrationSettings, Loading
from kernels import native
from kernels.attention.quantized.layout import RowLayout
from kernels.attention.quantized.transforms import Hadamard, Permutation
from kvcache.calibration import FILE_NAME, Calibration, CalibrationError, Header, write_calibration
from kvcache.layout import PageLayout
from kvcache.policy import CALIBRATED, LayerPolicy, PolicyError, read_policy

CHUNK = 512  # tokens of a step
SEED = 0  # of the rows that are measured

OnProgress = Callable[[Loading], None]


@dataclass(frozen=True)
class Found:
    """What one layer shall do, and what that gains."""

    keys: Quantizer
    values: Quantizer
    before: float  # output error over output size, uncalibrated; on texts held out
    after: float


def calibrate(settings: CalibrationSettings, on_progress: OnProgress | None = None) -> CalibrationReport:
    """Search every layer and write the artifact. Raises ValueError (PolicyError, CalibrationError, CheckpointError,
    UnsupportedModel) naming what is wrong with the policy, the text, the model or the place to write."""
    started = time.monotonic()
    checkpoint = open_checkpoint(Path(settings.model))
    layout = _layout(checkpoint, settings.policy)
    path = _place(Path(settings.out) if settings.out else checkpoint.folder / FILE_NAME)
    name = fingerprint(checkpoint.config, checkpoint.source)
    texts = read_texts(settings, checkpoint.config.context_len, layout)
    config = EngineConfig(settings.model, kv_policy="f32")
    plan = resolve(config, model_facts(checkpoint, config))
    torch.set_num_threads(plan.threads)
    native.set_num_threads(plan.threads)
    model = load_model(checkpoint, plan).model
    layers = _layers(layout)
    found: list[Found] = []
    for i, recorded in enumerate(record(model, texts.ids, CHUNK)):
        if on_progress is not None:
            on_progress(Loading(i, layout.num_layers))
        found.append(_search_layer(layout, layers[i], recorded, texts.num_fit))
    calibration = _assemble(layout, found, name, texts.provenance)
    write_calibration(path, calibration)
    advised = wider(layout.policy, [one.after for one in found])
    return CalibrationReport(
        artifact=str(path),
        policy=str(layout.policy),
        digest=calibration.digest,
        provenance=texts.provenance,
        num_tokens=sum(map(len, texts.ids)),
        seconds=time.monotonic() - started,
        layers=[_report(layer, one) for layer, one in zip(layers, found, strict=True)],
        wider=None if advised is None else str(advised),
    )


def _place(path: Path) -> Path:
    """Where to write, known to be possible before the search begins. Raises CalibrationError."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"{path.parent} is no folder that can be written to"
        raise CalibrationError(f"{path} cannot be written: {reason}. Name a file with --out")
    return path


def _layout(checkpoint: Checkpoint, text: str) -> PageLayout:
    """Raises PolicyError for a policy that uses no artifact or cannot serve the model."""
    policy, config = read_policy(text), checkpoint.config
    if not policy.is_calibrated:
        raise PolicyError(f"KV cache policy {policy} needs no calibration: name one that does, such as skvq:k2v2")
    layout = PageLayout(policy, config.num_layers, config.num_kv_heads, config.head_dim, PAGE_SIZE)
    groups = {layer.group_size for layer in _layers(layout) if layer.transform == CALIBRATED}
    if len(groups) > 1:
        raise PolicyError(f"KV cache policy {policy} has groups of {sorted(groups)}: an artifact holds one size")
    return layout


def _layers(layout: PageLayout) -> tuple[LayerPolicy, ...]:
    """What each layer does once there is an artifact."""
    return layout.policy.layers(layout.num_layers, layout.head_dim, has_artifact=True)


@torch.inference_mode()
def _search_layer(layout: PageLayout, layer: LayerPolicy, recorded: list[Recorded], num_fit: int) -> Found:
    generator = torch.Generator().manual_seed(SEED)
    policy = layout.policy
    heads = [heads_of(text, policy.window, policy.num_sinks, generator) for text in recorded]
    held_out = heads[num_fit:]
    bits = (layer.key_bits, layer.value_bits) if layer.is_quantized else (16.0, 16.0)
    group_size = layer.group_size or layout.head_dim
    sides = [
        Side(heads[:num_fit], held_out, RowLayout(width, layout.head_dim, group_size), is_keys)
        for width, is_keys in zip(bits, (True, False), strict=True)
    ]
    keys, values = (search(side) if layer.transform == CALIBRATED else uncalibrated(side) for side in sides)
    size = sum(head.size for text in held_out for head in text)
    return Found(
        keys,
        values,
        _error(held_out, uncalibrated(sides[0]), uncalibrated(sides[1])) / size,
        _error(held_out, keys, values) / size,
    )


def _error(texts: Sequence[Sequence[Head]], keys: Quantizer, values: Quantizer) -> float:
    """Of both together."""
    total = 0.0
    for text in texts:
        read_keys = keys.read(torch.stack([head.keys for head in text], dim=1))
        read_values = values.read(torch.stack([head.values for head in text], dim=1))
        total += sum(head.error(read_keys[:, i], read_values[:, i]) for i, head in enumerate(text))
    return total


def _assemble(layout: PageLayout, found: Sequence[Found], name: str, provenance: str) -> Calibration:
    calibrated = next(layer for layer in _layers(layout) if layer.transform == CALIBRATED)
    header = Header(
        format="kvcal/1",
        fingerprint=name,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        group_size=calibrated.group_size,
        bits=tuple((layer.key_bits, layer.value_bits) for layer in _layers(layout)),
        hadamard=tuple((_turns(one.keys), _turns(one.values)) for one in found),
        rope="after",
        clip_mode="mid",
        parameters="e4m3",
        window=layout.policy.window,
        num_sinks=layout.policy.num_sinks,
        provenance=provenance,
    )
    num_groups = layout.head_dim // header.group_size
    keys, values = [one.keys for one in found], [one.values for one in found]
    return Calibration(
        header,
        k_perm=torch.stack([_order(one) for one in keys]),
        v_perm=torch.stack([_order(one) for one in values]),
        k_clip=torch.stack([_clips(one, num_groups) for one in keys]),
        v_clip=torch.stack([_clips(one, num_groups) for one in values]),
        k_ps=torch.stack([one.codec.prescale for one in keys]),
        v_ps=torch.stack([one.codec.prescale for one in values]),
        k_mean=torch.stack([one.mean for one in keys]),
        k_scale=torch.stack([one.scale for one in keys]),
    )


def _turns(quantizer: Quantizer) -> bool:
    return isinstance(quantizer.turn, Hadamard)


def _order(quantizer: Quantizer) -> Tensor:
    """[num_kv_heads, D] int16"""
    turn, shape = quantizer.turn, quantizer.mean.shape
    return (turn.order if isinstance(turn, Permutation) else torch.arange(shape[-1]).expand(shape)).short()


def _clips(quantizer: Quantizer, num_groups: int) -> Tensor:
    """[num_kv_heads, num_groups] float16; ones where there is nothing to clip."""
    clip = quantizer.codec.clip
    return (clip if clip.shape[1] == num_groups else torch.ones(len(clip), num_groups)).half()


def _report(layer: LayerPolicy, found: Found) -> CalibratedLayer:
    keys, values = ("" if not layer.is_quantized else side.name for side in (found.keys, found.values))
    clips = [one.codec.clip for one in (found.keys, found.values)]
    key_clip, value_clip = (float(clip.mean()) if clip.numel() else 1.0 for clip in clips)
    return CalibratedLayer(layer.name, keys, values, key_clip, value_clip, found.before, found.after)
