"""What book-keeping costs per step as live requests grow:  python -m benchmarks.scheduler [--live 10 100 1000]

Times scheduling, page bookkeeping, prefix hashing and batch building with no model behind them: N sequences decode at
a context of 512 tokens, all of them in every step.
"""

import argparse
import json
import statistics
import time

from engine.batch import BatchRow, build_batch
from engine.messages import Sampling, Submit
from engine.request import Request, Sequence
from engine.scheduler import Scheduler, Slice
from kvcache.manager import KVCacheManager

PAGE_SIZE = 64  # tokens
CONTEXT = 512  # tokens of every sequence when timing starts
BATCH_TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=int, nargs="+", default=[10, 100, 1000], help="sequences that decode")
    parser.add_argument("--steps", type=int, default=50, help="that are timed; the median counts")
    args = parser.parse_args()
    if min(*args.live, args.steps) < 1:
        parser.error("--live and --steps must be at least 1")
    rows = [measure(num_live, args.steps) for num_live in args.live]
    for row in rows:
        print(f"{row['num_live']:>6} live: {row['ms_per_step']:8.3f} ms a step, {row['us_per_sequence']:6.2f} us each")
    print(json.dumps({"benchmark": "scheduler", "context": CONTEXT, "rows": rows}))


def measure(num_live: int, num_timed: int) -> dict[str, float]:
    """Median milliseconds of `num_timed` steps with `num_live` decoding sequences."""
    num_steps = num_live * CONTEXT // BATCH_TOKENS + num_timed + 3  # the first to start decodes while others prefill
    num_pages = num_live * ((CONTEXT + 2 * num_steps) // PAGE_SIZE + 2)
    manager = KVCacheManager(num_pages, PAGE_SIZE, salt="benchmark")
    scheduler = Scheduler(manager, max_num_seqs=num_live, max_batch_tokens=BATCH_TOKENS)
    for i in range(num_live):
        prompt = [(i * 7919 + j) % 32000 for j in range(CONTEXT)]
        submit = Submit(str(i), prompt, Sampling(max_tokens=4096), arrival=0.0)
        scheduler.add(Sequence(i, Request(submit, i, seed=0), 0, list(prompt)))
    while scheduler.num_waiting or not all(s.is_decoding for s in scheduler.sequences()):
        step(scheduler, manager)
    seconds = [step(scheduler, manager) for _ in range(num_timed)]
    median = statistics.median(seconds)
    return {"num_live": num_live, "ms_per_step": median * 1e3, "us_per_sequence": median / num_live * 1e6}


def step(scheduler: Scheduler, manager: KVCacheManager) -> float:
    """Seconds of everything a step does besides the model and sampling."""
    started = time.perf_counter()
    slices = scheduler.schedule()
    build_batch([row_of(item) for item in slices])
    for item in slices:
        sequence = item.sequence
        sequence.num_computed = item.start + item.num_tokens
        manager.commit(sequence.id, sequence.tokens, sequence.num_computed)
        if item.completes:
            sequence.tokens.append(7)
    return time.perf_counter() - started


def row_of(item: Slice) -> BatchRow:
    tokens = item.sequence.tokens[item.start : item.start + item.num_tokens]
    return BatchRow(tokens, item.start, item.block_table, PAGE_SIZE, int(item.completes))


if __name__ == "__main__":
    main()
