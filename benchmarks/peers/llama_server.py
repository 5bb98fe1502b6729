"""Writes what llama-server serves:  python -m benchmarks.peers.llama_server, in an environment with gguf.

The file is that of benchmarks.peers.llama_cpp with a vocabulary, without which no llama-server starts. The server is
a program of its own, which benchmarks.servers starts.
"""

import sys
from pathlib import Path

from benchmarks.peers.protocol import Model, Refused, Setup, answer_requests
from benchmarks.shapes import SHAPES


def prepare(setup: Setup) -> str:
    """Write the file when it is not there; returns its path. Raises Refused for formats llama.cpp has not."""
    try:
        from benchmarks.peers.gguf_files import wanted_type, write_gguf
    except ModuleNotFoundError as error:
        raise Refused(
            f"{sys.executable} cannot import {error.name}: run `pip install gguf` in any environment and name its "
            "interpreter with --peer-python"
        ) from None
    shape, wanted = SHAPES[setup.shape].with_layers(setup.num_layers), wanted_type(setup)
    path = Path(setup.folder) / f"{setup.shape}-{shape.num_layers}-{wanted}-vocabulary.gguf"
    if not path.is_file():
        write_gguf(path, shape, wanted, with_vocabulary=True)
    return str(path)


def load(_: Setup) -> Model:
    raise Refused("llama-server is measured from outside, by benchmarks.servers")


if __name__ == "__main__":
    answer_requests(prepare, load)
