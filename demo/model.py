"""The demo model: the Qwen3 architecture, small enough to read, fast to train on a CPU.

Parameter names and layouts equal those of `transformers.Qwen3ForCausalLM`, so a state dict is a checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSS_CHUNK = 1024  # tokens


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the field names are those of a Hugging Face config."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6

    def to_dict(self) -> dict[str, int | float]:
        """The fields as plain JSON values."""
        return asdict(self)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x, in float32."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def rope_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and channel, each [length, head_dim], float32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), config.rope_theta**-half)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [batch, heads, seq, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-right, left], -1).float() * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention with normalised queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, seq, hidden] -> [batch, seq, hidden]."""
        batch, seq, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, seq, self.heads, self.dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, seq, self.kv_heads, self.dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, seq, self.kv_heads, self.dim).transpose(1, 2)
        repeat = self.heads // self.kv_heads
        k = rotate(k, cos, sin).repeat_interleave(repeat, dim=1)  # [batch, heads, seq, head_dim]
        v = v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, seq, -1))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, seq, hidden] -> [batch, seq, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and the final norm (named `model` in the state dict)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DemoModel(nn.Module):
    """Token ids -> logits; the output head is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        cos, sin = rope_tables(config, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Normal weights, projections back into the residual stream zero; then the circuits of `demo.circuits`."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.1 if "embed" in name else parameter.shape[1] ** -0.5)
        nn.init.constant_(self.model.norm.weight, 0.3)

    def attention(self, layer: int) -> Attention:
        """The attention of one layer."""
        found = self.model.layers[layer].get_submodule("self_attn")
        assert isinstance(found, Attention)
        return found

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [batch, seq] -> final hidden states [batch, seq, hidden]."""
        seq = ids.shape[1]
        cos, sin = self.get_buffer("cos")[:seq], self.get_buffer("sin")[:seq]
        x: Tensor = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.model.norm(x)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, seq] -> logits [batch, seq, vocab]."""
        return F.linear(self.hidden(ids), self.model.embed_tokens.weight)

    def loss(self, ids: Tensor, weights: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
        """Weighted next-token cross-entropy plus z-loss, summed; and the sum of all token losses for reporting.

        ids [batch, seq + 1]; weights [batch, seq + 1], the weight of each token as a target. The vocabulary-sized
        logits exist for `LOSS_CHUNK` tokens at a time, which keeps them in cache on a CPU.
        """
        x = self.hidden(ids[:, :-1]).flatten(0, 1)  # [tokens, hidden]
        targets, w = ids[:, 1:].flatten(), weights[:, 1:].flatten()
        total = x.new_zeros((), dtype=torch.float32)
        plain = torch.zeros_like(total)
        for start in range(0, x.shape[0], LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            logits = F.linear(x[part], self.model.embed_tokens.weight).float()  # [chunk, vocab]
            lse = logits.logsumexp(-1)
            token = lse - logits.gather(-1, targets[part, None]).squeeze(-1)
            total = total + ((token + z_weight * lse.square()) * w[part]).sum()
            plain = plain + token.detach().sum()
        return total, plain
