"""What the layers above the kernels cost:  python -m benchmarks.serving [--model FOLDER] [--streams 8] [--rounds 5]

The same decode three times in turn, A B C A B C ...: the model's forward pass alone (bare), the engine's step
(engine), and a real server process read by as many HTTP streams (server). Prints tokens per second, medians of the
rounds, and the two ratios; prefill is left out of all three.

--shape llama-3-8b writes a 4-bit checkpoint with random weights in place of --model; --device cuda has all three on a
GPU, which must hold the weights twice.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from benchmarks.checkpoints import write_checkpoint
from benchmarks.gpu_timing import require_cuda
from benchmarks.shapes import SHAPES, Shape
from engine.assembly import build
from engine.batch import BatchRow, build_batch
from engine.config import Device, EngineConfig
from engine.core import EngineCore
from engine.messages import Sampling, Submit, Token

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"
CACHE = "f16"  # of all three sides
PROMPT_TOKENS = 32
START_LIMIT_S = 300.0
GPU_KV_MEMORY = 4 << 30  # bytes


@dataclass(frozen=True)
class Load:
    """What is decoded in each round."""

    model: Path
    num_streams: int
    num_tokens: int  # of each stream
    device: Device = "cpu"

    @property
    def kv_memory(self) -> int | None:
        """A GPU is shared with the other engine, and has no use for more than these streams."""
        return GPU_KV_MEMORY if self.device == "cuda" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, help="of random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda":
        require_cuda()
    with tempfile.TemporaryDirectory() as folder:
        if args.shape is not None:
            write_random(Path(folder), SHAPES[args.shape])
        model = args.model if args.shape is None else Path(folder)
        compare(Load(model, args.streams, args.tokens, args.device), args.rounds, args.shape or model.name)


def write_random(folder: Path, shape: Shape) -> None:
    """A checkpoint, and a tokenizer with a word for each id."""
    write_checkpoint(folder, shape)
    words = Tokenizer(BPE(vocab={f"t{i}": i for i in range(shape.vocab)}, merges=[]))
    words.decoder = ByteLevel()
    words.save(str(folder / "tokenizer.json"))


def compare(load: Load, num_rounds: int, name: str) -> None:
    config = EngineConfig(
        str(load.model), kv_policy=CACHE, prefix_caching=False, device=load.device, kv_memory=load.kv_memory
    )
    core, plan = build(config)
    rates: dict[str, list[float]] = {"bare": [], "engine": [], "server": []}
    with Server(load) as server:
        for number in range(num_rounds + 1):
            measured = {
                "bare": bare_rate(core, load),
                "engine": engine_rate(core, load, number),
                "server": asyncio.run(server_rate(server.url, load)),
            }
            if number > 0:  # the first round warms up
                for side, rate in measured.items():
                    rates[side].append(rate)
    medians = {side: statistics.median(values) for side, values in rates.items()}
    for side, values in rates.items():
        print(f"{side:>7}: {medians[side]:9.1f} tok/s   ({min(values):.1f} .. {max(values):.1f})")
    result = {
        "benchmark": "serving",
        "model": name,
        "device": load.device,
        "threads": plan.threads,
        "streams": load.num_streams,
        "tokens": load.num_tokens,
        "tok_per_s": medians,
        "engine_over_bare": medians["engine"] / medians["bare"],
        "server_over_engine": medians["server"] / medians["engine"],
    }
    print(json.dumps(result))


def bare_rate(core: EngineCore, load: Load) -> float:
    """Tokens per second of the forward pass alone, at the contexts the engine's decode goes through."""
    parts = core.parts
    pages_each = -(-(PROMPT_TOKENS + load.num_tokens) // parts.plan.page_size)
    tables = [list(range(i * pages_each, (i + 1) * pages_each)) for i in range(load.num_streams)]
    seconds = 0.0
    for position in range(PROMPT_TOKENS, PROMPT_TOKENS + load.num_tokens):
        batch = build_batch([BatchRow([5], position, table, parts.plan.page_size, 1) for table in tables])
        started = time.perf_counter()
        parts.runner.run(batch)
        if load.device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
    return load.num_streams * load.num_tokens / seconds


def engine_rate(core: EngineCore, load: Load, number: int) -> float:
    """Tokens per second of the engine's steps once every stream decodes."""
    sampling = Sampling(max_tokens=load.num_tokens + 1, temperature=0.0, ignore_eos=True)
    prompt = list(range(1, PROMPT_TOKENS + 1))
    events = core.step([Submit(f"{number}.{i}", prompt, sampling, time.monotonic()) for i in range(load.num_streams)])
    started = time.perf_counter()
    num_tokens = 0
    while core.has_work:
        events = core.step([])
        num_tokens += sum(isinstance(event, Token) for event in events)
    return num_tokens / (time.perf_counter() - started)


async def server_rate(url: str, load: Load) -> float:
    """Tokens per second that clients see, from the moment all of them have their first to the last one's end."""
    async with httpx.AsyncClient(timeout=START_LIMIT_S) as client:
        spans = await asyncio.gather(*(stream(client, url, load) for _ in range(load.num_streams)))
    first = max(span[0] for span in spans)
    last = max(span[1] for span in spans)
    return load.num_streams * load.num_tokens / (last - first)


async def stream(client: httpx.AsyncClient, url: str, load: Load) -> tuple[float, float]:
    """When the first and the last piece of one stream arrived."""
    body = {
        "model": "bench",
        "prompt": list(range(1, PROMPT_TOKENS + 1)),
        "max_tokens": load.num_tokens + 1,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    times = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                times.append(time.perf_counter())
    return times[0], times[-1]


class Server:
    """`nibble serve` on a free port."""

    def __init__(self, load: Load) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "server.cli", "serve", str(load.model), "--served-name", "bench"]
        command += ["--port", str(port), "--no-prefix-caching", "--kv", CACHE, "--device", load.device]
        command += [] if load.kv_memory is None else ["--kv-memory", str(load.kv_memory)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError("the server ended before it was ready")
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError("the server did not become ready")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)


if __name__ == "__main__":
    main()
