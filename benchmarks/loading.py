"""How long a checkpoint takes to load, and how much memory:  python -m benchmarks.loading [--shape llama-3.2-1b]

--device cuda loads it to a GPU: the memory is the host's all the same.

Writes a 4-bit checkpoint of the shape with random weights, starts the engine in a process of its own, and compares the
process's peak memory with what it must hold: the packed weights and the KV cache pages it has written.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoints import write_checkpoint
from benchmarks.shapes import SHAPES, SMALLEST
from engine.config import Device, EngineConfig
from engine.messages import Done, Sampling, Submit
from engine.remote import RemoteClient

KV_MEMORY = 64 << 20  # bytes; small, so that the figure is about weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_checkpoint(Path(folder), SHAPES[args.shape])
        empty = asyncio.run(measure(None, args.device))
        loaded = asyncio.run(measure(Path(folder), args.device))
    result = {
        "benchmark": "loading",
        "shape": args.shape,
        "device": args.device,
        "weight_mib": num_bytes / 2**20,
        "seconds_to_first_token": loaded["seconds"],
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


def peak_mib(process_id: int | None) -> float:
    """The most memory the process has had resident, shared file pages included."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    main()
