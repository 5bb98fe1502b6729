"""Writes what our server serves:  python -m benchmarks.peers.nibble_server

The checkpoint is that of benchmarks.peers.nibble with a tokenizer, without which no server starts.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from benchmarks.peers import nibble
from benchmarks.peers.protocol import Model, Refused, Setup, answer_requests
from benchmarks.peers.vocabulary import words
from benchmarks.shapes import SHAPES


def prepare(setup: Setup) -> str:
    """Write the checkpoint when it is not there; returns its folder. Raises Refused for a format we cannot write."""
    folder = Path(nibble.prepare(setup))
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer(folder, SHAPES[setup.shape].vocab)
    return str(folder)


def write_tokenizer(folder: Path, size: int) -> None:
    """`words` as a checkpoint's tokenizer."""
    vocab = {word: i for i, word in enumerate(words(size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)  # type: ignore[no-untyped-call]


def load(_: Setup) -> Model:
    raise Refused("our server is measured from outside, by benchmarks.servers")


if __name__ == "__main__":
    answer_requests(prepare, load)
