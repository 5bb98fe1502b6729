"""Calibration artifacts of no merit: every part of them changes something."""

from pathlib import Path

import torch

from engine.calibration.fingerprint import fingerprint
from engine.loading import open_checkpoint
from kvcache.calibration import Calibration, Header, write_calibration
from kvcache.policy import read_policy


def random_calibration(folder: Path, policy: str, rotated: bool = True, seed: int = 0) -> Calibration:
    """Random orders, clips and rotations for the model in `folder` and a policy that quantizes every layer."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    layers = read_policy(policy).layers(config.num_layers, config.head_dim, has_artifact=True)
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    header = Header(
        format="kvcal/1",
        fingerprint=fingerprint(config, checkpoint.source),
        num_layers=shape[0],
        num_kv_heads=shape[1],
        head_dim=shape[2],
        group_size=layers[0].group_size,
        bits=tuple((layer.key_bits, layer.value_bits) for layer in layers),
        hadamard=tuple((bool(i % 2), not i % 2) for i in range(shape[0])),
        rope="after",
        clip_mode="mid",
        parameters="e4m3",
        window=0,
        num_sinks=0,
        provenance="nothing",
    )
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(2, *shape, generator=generator).argsort(-1).short()
    num_groups = shape[2] // header.group_size
    clips = torch.rand(2, *shape[:2], num_groups, generator=generator) / 2 + 0.5
    scales = torch.exp2(torch.randint(-4, 2, (2, *shape[:2]), generator=generator))
    turns = torch.linalg.qr(torch.randn(2, *shape, shape[2], generator=generator))[0]
    shift = torch.exp2(torch.randint(-2, 3, shape, generator=generator))
    tensors = (*orders, *clips.half(), *scales, torch.randn(*shape, generator=generator), shift)
    return Calibration(header, *tensors, *(turns if rotated else ()))


def write_random(folder: Path, policy: str, path: Path, rotated: bool = True) -> Path:
    """An artifact at `path`."""
    write_calibration(path, random_calibration(folder, policy, rotated))
    return path
