"""How long a checkpoint takes to load, and how much memory:  python -m benchmarks.loading [--shape llama-3.2-1b]

--device cuda loads it to a GPU: the memory is the host's all the same. --serve N also starts `nibble serve` so often,
and says how long it takes from the command to the first token of an answer.

Writes a 4-bit checkpoint of the shape with random weights, starts the engine in a process of its own, and compares the
process's peak memory with what it must hold: the packed weights and the KV cache pages it has written.
"""

import argparse
import asyncio
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoints import write_checkpoint
from benchmarks.gpu_timing import require_cuda
from benchmarks.shapes import SHAPES, SMALLEST
from engine.config import Device, EngineConfig
from engine.messages import Done, Sampling, Submit
from engine.remote import RemoteClient

KV_MEMORY = 64 << 20  # bytes; small, so that the figure is about weights
POLL_S = 0.02
START_LIMIT_S = 600
COMMAND = (sys.executable, "-c", "from server.main import main; main()", "serve")  # what the console script runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--serve", type=int, default=0, metavar="N", help="starts of nibble serve to time")
    args = parser.parse_args()
    if args.device == "cuda":
        require_cuda()
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_checkpoint(Path(folder), SHAPES[args.shape])
        empty = asyncio.run(measure(None, args.device))
        loaded = asyncio.run(measure(Path(folder), args.device))
        starts = serve(Path(folder), SHAPES[args.shape].vocab, args.device, args.serve)
    result = {
        "benchmark": "loading",
        "shape": args.shape,
        "device": args.device,
        "weight_mib": num_bytes / 2**20,
        "seconds_to_first_token": loaded["seconds"],
        **({"serve_seconds_to_first_token": statistics.median(starts)} if starts else {}),
        "decode_tok_per_s": loaded["decode"],
        "peak_rss_mib": loaded["peak_mib"],
        "empty_engine_rss_mib": empty["peak_mib"],
        "peak_over_weights": (loaded["peak_mib"] - empty["peak_mib"]) / (num_bytes / 2**20),
    }
    for name, value in result.items():
        print(f"{name:>24}: {value:.2f}" if isinstance(value, float) else f"{name:>24}: {value}")
    print(json.dumps(result))


async def measure(folder: Path | None, device: Device) -> dict[str, float]:
    """Seconds from start to the first answer, and the engine's peak resident memory; None: a model of no size."""
    with tempfile.TemporaryDirectory() as tiny:
        if folder is None:
            folder = Path(tiny)
            write_checkpoint(folder, SMALLEST)
        started = time.monotonic()
        client = RemoteClient(EngineConfig(str(folder), device=device, kv_memory=KV_MEMORY))
        await client.start()
        ready = await client.wait_ready()
        stream = client.submit(Submit("a", [1, 2, 3], Sampling(max_tokens=1, temperature=0.0), time.monotonic()))
        while not any(isinstance(event, Done) for event in await stream.next()):
            pass
        seconds = time.monotonic() - started
        peak = peak_mib(client.process_id)
        await client.stop()
    return {"seconds": seconds, "peak_mib": peak, "decode": ready.plan.decode_tokens_per_s}


def serve(folder: Path, vocab: int, device: Device, count: int) -> list[float]:
    """Seconds from each start of `nibble serve` to the first token that a client has."""
    if count:
        from benchmarks.peers.nibble_server import write_tokenizer  # the engine alone needs none of its libraries

        write_tokenizer(folder, vocab)
    return [_serve_once(folder, device) for _ in range(count)]


def _serve_once(folder: Path, device: Device) -> float:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = ("--port", str(port), "--served-name", "bench", "--device", device, "--kv-memory", str(KV_MEMORY))
    body = json.dumps({"model": "bench", "prompt": [1, 2, 3], "max_tokens": 1})
    started = time.monotonic()
    process = subprocess.Popen([*COMMAND, str(folder), *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while _status(port, "GET", "/ready") != http.client.OK:
            if process.poll() is not None or time.monotonic() - started > START_LIMIT_S:
                raise RuntimeError(f"nibble serve did not start; status {process.poll()}")
            time.sleep(POLL_S)
        if (status := _status(port, "POST", "/v1/completions", body)) != http.client.OK:
            raise RuntimeError(f"nibble serve answered {status}")
        return time.monotonic() - started
    finally:
        process.terminate()
        process.wait()


def _status(port: int, method: str, path: str, body: str | None = None) -> int | None:
    """Of a whole answer; None where nobody listens. A bare connection: a client of more comfort would take the machine
    from what is timed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_LIMIT_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
    except OSError:
        return None
    else:
        return response.status
    finally:
        connection.close()


def peak_mib(process_id: int | None) -> float:
    """The most memory the process has had resident, shared file pages included."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    main()
