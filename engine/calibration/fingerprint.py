"""A name for the model that a calibration artifact was made for.

Statistics of keys and values belong to the weights that make them. The fingerprint is a hash of

    config      heads, head size, layers, the rotary embedding, whether heads are normalized
    tensors     of every key and value projection, with their norms and biases, sorted by name: the name, dtype and
                shape, and SPOTS runs of SPOT_BYTES bytes spread over the content

Headers and 4 KiB a tensor are read, so that an 8B model takes milliseconds. How the tensors are spread over files does
not matter; another checkpoint of the same model in another format has another fingerprint, as its keys differ too.
"""

import re
from dataclasses import asdict
from hashlib import blake2b

import msgspec
import torch
from torch import Tensor

from engine.checkpoint.source import Source
from engine.models.config import ModelConfig

DIGEST_BYTES = 16
SPOTS = 4
SPOT_BYTES = 1024
MADE_BY = re.compile(r".*\.self_attn\.(k_proj|v_proj|k_norm|q_norm)\..*")  # what keys and values come from
FACTS = ("architecture", "num_layers", "num_heads", "num_kv_heads", "head_dim", "rope", "qk_norm")


def fingerprint(config: ModelConfig, source: Source) -> str:
    """32 hex digits. Reads a little of the tensors and counts none of them as read."""
    content = blake2b(digest_size=DIGEST_BYTES)
    facts = asdict(config)
    content.update(msgspec.json.encode({name: facts[name] for name in FACTS}, order="sorted"))
    for name in sorted(filter(MADE_BY.fullmatch, source.names())):
        content.update(f"{name} {source.dtype(name)} {list(source.shape(name))}".encode())
        content.update(_sample(source.peek(name)))
    return content.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """The first bytes, the last, and some between."""
    held = tensor.flatten().view(torch.uint8)
    last = max(0, len(held) - SPOT_BYTES)
    starts = [last * i // (SPOTS - 1) for i in range(SPOTS)]
    return b"".join(held[start : start + SPOT_BYTES].numpy().tobytes() for start in starts)
