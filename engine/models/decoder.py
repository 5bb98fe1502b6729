"""The pre-norm decoder that the supported architectures share.

    x = embedding[ids]
    for every layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))
    logits = head(norm(x))

An architecture file says which layers carry biases and norms; the names below are common to all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batch import Batch
from engine.models.config import ModelConfig
from engine.models.layers import MLP, Attention, Embedding, Linear, Parts, RMSNorm, Rope, Rotation


@dataclass(frozen=True)
class Layer:
    """One transformer layer."""

    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: MLP

    def __call__(self, stream: "Stream", cache: Any, batch: Batch) -> "Stream":
        """Stores the keys and values of the batch's rows in `cache`."""
        x, normed = self.input_norm.add(stream.x, stream.delta)
        x, normed = self.post_attention_norm.add(x, self.attention(normed, stream.rotation, cache, batch.attention))
        return Stream(x, self.mlp(normed), stream.rotation)


@dataclass(frozen=True)
class Stream:
    """What goes from layer to layer."""

    x: Tensor  # [num_tokens, hidden_size], the residual stream
    delta: Tensor  # [num_tokens, hidden_size], what the next norm adds to it before it reads it
    rotation: Rotation  # the same for all layers


@dataclass(frozen=True)
class Decoder:
    """A model ready to run. Holds weights only: everything about a step comes in as an argument."""

    config: ModelConfig
    embedding: Embedding
    rope: Rope
    layers: tuple[Layer, ...]
    final_norm: RMSNorm
    head: Linear

    def forward(self, batch: Batch, caches: Sequence[Any]) -> Tensor:
        """Store the batch's keys and values in `caches`, one per layer; return [num_logits, vocab] float32."""
        stream = self.embed(batch)
        for layer, cache in zip(self.layers, caches, strict=True):
            stream = layer(stream, cache, batch)
        return self.logits(stream, batch.logit_rows)

    def embed(self, batch: Batch) -> Stream:
        """What the first layer reads."""
        x = self.embedding(batch.input_ids)  # [num_tokens, hidden_size]
        return Stream(x, torch.zeros_like(x), self.rope.angles(batch.positions))

    def logits(self, stream: Stream, rows: Tensor) -> Tensor:
        """What the last layer gave -> [num_logits, vocab] float32; rows: [num_logits]."""
        x, delta = stream.x, stream.delta
        if len(rows) < len(x):  # some tokens are of an unfinished prompt
            x, delta = x.index_select(0, rows), delta.index_select(0, rows)
        _, wanted = self.final_norm.add(x, delta)
        return self.head(wanted).float()  # [num_logits, vocab]


def build_decoder(config: ModelConfig, parts: Parts) -> Decoder:
    """Assemble the model, asking `parts` for one layer after the other in the order of the forward pass."""
    embedding, head = parts.embedding_and_head("model.embed_tokens", "lm_head", config)
    rope = parts.rope(config)
    return Decoder(
        config=config,
        embedding=embedding,
        rope=rope,
        layers=tuple(_layer(config, parts, rope, i) for i in range(config.num_layers)),
        final_norm=parts.norm("model.norm", config.hidden_size, config.rms_norm_eps),
        head=head,
    )


def _layer(config: ModelConfig, parts: Parts, rope: Rope, index: int) -> Layer:
    name = f"model.layers.{index}"
    return Layer(
        input_norm=parts.norm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps),
        attention=_attention(config, parts, rope, index),
        post_attention_norm=parts.norm(f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps),
        mlp=_mlp(config, parts, f"{name}.mlp"),
    )


def _attention(config: ModelConfig, parts: Parts, rope: Rope, index: int) -> Attention:
    name = f"model.layers.{index}.self_attn"
    hidden, head_dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    return Attention(
        qkv_proj=parts.projections(
            [
                (f"{name}.q_proj", (q_size, hidden)),
                (f"{name}.k_proj", (kv_size, hidden)),
                (f"{name}.v_proj", (kv_size, hidden)),
            ],
            config.qkv_bias,
        ),
        o_proj=parts.linear(f"{name}.o_proj", (hidden, q_size), config.output_bias),
        q_norm=parts.norm(f"{name}.q_norm", head_dim, eps) if config.qk_norm else None,
        k_norm=parts.norm(f"{name}.k_norm", head_dim, eps) if config.qk_norm else None,
        rope=rope,
        kernel=parts.attention_kernel(config, index),
        head_dim=head_dim,
    )


def _mlp(config: ModelConfig, parts: Parts, name: str) -> MLP:
    hidden, inner = config.hidden_size, config.intermediate_size
    return MLP(
        gate_up_proj=parts.projections(
            [(f"{name}.gate_proj", (inner, hidden)), (f"{name}.up_proj", (inner, hidden))], config.mlp_bias
        ),
        down_proj=parts.linear(f"{name}.down_proj", (hidden, inner), config.mlp_bias),
        kernel=parts.activation_kernel(config),
    )
