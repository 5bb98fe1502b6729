"""What rounding at run time changes:  python -m benchmarks.rounding [--model FOLDER] [--text FILE] [--json]

The same text goes through the model as it is stored (activations in float, the output head in its own bits) and with
activations in 8 bits, with the head in 8 bits, and with both, the default. Of each: the mean and the largest
Kullback-Leibler divergence of its next-token distributions from the stored model's, how often both name the same
likeliest token, and the loss on the text.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from engine.assembly import build
from engine.batch import BatchRow, build_batch
from engine.config import EngineConfig

ROOT = Path(__file__).parent.parent
DEMO, CHAPTER = ROOT / "demo" / "checkpoint", ROOT / "demo" / "heldout_chapter.txt"
STORED: dict[str, Any] = {"activations": "float", "head_bits": 16}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("8-bit head", {"activations": "float", "head_bits": 8}),
    ("8-bit activations", {"activations": "int8", "head_bits": 16}),
    ("both, the default", {"activations": "int8", "head_bits": 8}),
)
CHUNK = 256  # tokens of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--text", type=Path, default=CHAPTER)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help="print the last line only")
    args = parser.parse_args()
    text = args.text.read_text("utf-8")
    ids: list[int] = AutoTokenizer.from_pretrained(args.model)(text)["input_ids"][: args.tokens]
    stored = log_probs(args.model, ids, STORED)  # [num_tokens, vocab]
    result: dict[str, Any] = {"benchmark": "rounding", "model": args.model.name, "tokens": len(ids)}
    result["stored"] = {"loss": loss(stored, ids)}
    for name, settings in VARIANTS:
        result[name] = compare(stored, log_probs(args.model, ids, settings), ids)
    if not args.json:
        print(f"{len(ids)} tokens of {args.text.name}; loss as stored {result['stored']['loss']:.4f}")
        for name, _ in VARIANTS:
            print(f"{name:>20}: " + "  ".join(f"{key} {value:.2e}" for key, value in result[name].items()))
    print(json.dumps(result))


def log_probs(model: Path, ids: list[int], settings: dict[str, Any]) -> Tensor:
    """Log-probabilities of the next token at every position: [num_tokens, vocab] float64."""
    core, plan = build(EngineConfig(str(model), kv_policy="f32", **settings))
    table = list(range(-(-len(ids) // plan.page_size)))
    return torch.cat([logits.double().log_softmax(-1) for logits in _chunks(core.parts.runner, ids, table, plan)])


def _chunks(runner: Any, ids: list[int], table: list[int], plan: Any) -> Iterator[Tensor]:
    for start in range(0, len(ids), CHUNK):
        tokens = ids[start : start + CHUNK]
        yield runner.run(build_batch([BatchRow(tokens, start, table, plan.page_size, len(tokens))]))


def compare(stored: Tensor, rounded: Tensor, ids: list[int]) -> dict[str, float]:
    """Both: [num_tokens, vocab] log-probabilities."""
    divergence = (stored.exp() * (stored - rounded)).sum(-1)  # [num_tokens]
    return {
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "other_first": float((stored.argmax(-1) != rounded.argmax(-1)).double().mean()),
        "loss_change": loss(rounded, ids) - loss(stored, ids),
    }


def loss(scores: Tensor, ids: list[int]) -> float:
    """Mean negative log-likelihood of the text."""
    return -float(scores[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).mean())


if __name__ == "__main__":
    main()
