"""Models with random weights, made on the device: no checkpoint on a disk, no weights on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu_timing import release
from benchmarks.shapes import Shape
from engine.config import Plan
from engine.loading import Checkpoint, CheckpointParts, LoadedModel, load_model
from engine.models import llama
from engine.models.config import ModelConfig
from engine.models.registry import ModelDescription
from engine.models.rope import RopeConfig
from kernels.linear.affine.layout import AffineWeights
from kernels.linear.dense.layout import DenseWeights
from kernels.linear.weights import LinearWeights

PAGE_SIZE = 64  # tokens
GROUP = 128  # channels that share a scale
HEAD = "lm_head"
HEAD_CODES = (8, 32)  # its bits and group, beside quantized layers
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class Kind:
    """A model: bits of its codes, or None for bfloat16; and the kernel insisted on."""

    name: str
    bits: int | None
    kernel: str | None = None


@dataclass
class RandomWeights:
    """Stands for a checkpoint's source and for its format: every tensor is made when it is asked for, on the device."""

    kind: Kind
    device: torch.device
    total_bytes: int = 0
    name: str = "random"

    def names(self) -> tuple[str, ...]:
        return tuple(f"{layer}.weight" for layer in (EMBEDDING, HEAD))

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """Norms of ones, so that rows keep their size; anything else with a spread that keeps it too."""
        if len(shape) == 1:
            return torch.ones(*shape, dtype=torch.bfloat16, device=self.device)
        weight: Tensor = torch.randn(*shape, device=self.device) / shape[-1] ** 0.5
        return weight.bfloat16()

    def linear(self, source: Any, name: str, shape: tuple[int, int], bias: bool) -> LinearWeights:
        if self.kind.bits is None:
            return LinearWeights((DenseWeights(self.take(name, shape)),))
        bits, group = HEAD_CODES if name == HEAD else (self.kind.bits, min(GROUP, shape[1]))
        num_rows, num_groups = shape[0], shape[1] // group
        codes = torch.randint(0, 256, (num_rows, shape[1] * bits // 8), dtype=torch.uint8, device=self.device)
        spread = 2**bits / 12**0.5  # of codes that are all as likely
        scales = torch.full((num_rows, num_groups), 1 / (spread * shape[1] ** 0.5), device=self.device).half()
        middle = torch.full((num_rows, num_groups), 1 << (bits - 1), dtype=torch.uint8, device=self.device)
        zeros = middle + torch.randint(0, 2, middle.shape, dtype=torch.uint8, device=self.device)
        return LinearWeights((AffineWeights(bits, shape[1], group, codes, scales, zeros),))

    def release(self) -> None: ...

    def drop_pages(self) -> None: ...

    def check_all_read(self) -> None: ...

    def close(self) -> None: ...


def config_of(shape: Shape) -> ModelConfig:
    return ModelConfig(
        architecture=llama.NAME,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope=RopeConfig("default", 500_000.0, shape.head_dim),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied_head=False,
        context_len=1 << 20,
        notes=(),
        eos_token_ids=(),
    )


def plan_of(kind: Kind, policy: str, num_pages: int = 1, num_recent_pages: int = 0, max_num_seqs: int = 1) -> Plan:
    return Plan(
        device="cuda",
        kernel=kind.kernel,
        kv_policy=policy,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        max_model_len=num_pages * PAGE_SIZE,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=512,
        prefix_caching=False,
        threads=1,
        activations="int8",
        head_bits=16,
        num_recent_pages=num_recent_pages,
    )


def checkpoint_of(kind: Kind, shape: Shape, device: torch.device) -> Checkpoint:
    random: Any = RandomWeights(kind, device)
    nowhere = Path("random-weights")
    return Checkpoint(nowhere, nowhere, ModelDescription(cast(Any, llama), config_of(shape)), random, random)


@dataclass
class Models:
    """One model at a time, for as many caches as want it: making it takes seconds, and two may not fit."""

    shape: Shape
    device: torch.device
    held: dict[Kind, LoadedModel] = field(default_factory=dict)

    def loaded(self, kind: Kind, policy: str) -> LoadedModel:
        """The model, its attention layers bound to the kernels of a cache."""
        checkpoint = checkpoint_of(kind, self.shape, self.device)
        plan = plan_of(kind, policy)
        if kind not in self.held:
            self.held.clear()
            release()
            self.held[kind] = load_model(checkpoint, plan)
        loaded, parts = self.held[kind], CheckpointParts(checkpoint, plan)
        layers = tuple(
            replace(layer, attention=replace(layer.attention, kernel=parts.attention_kernel(checkpoint.config, i)))
            for i, layer in enumerate(loaded.model.layers)
        )
        return replace(loaded, model=replace(loaded.model, layers=layers), layout=parts.layout)
