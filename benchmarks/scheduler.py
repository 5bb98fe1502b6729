"""What book-keeping costs per step as live requests grow:  python -m benchmarks.scheduler

Times scheduling, page bookkeeping, prefix hashing and batch building with no model behind them: N sequences decode at
a context of 512 tokens, all of them in every step.
"""

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
NUM_STEPS = 50
BATCH_TOKENS = 4096


def main() -> None:
    rows = [measure(num_live) for num_live in (10, 100, 1000)]
    for row in rows:
        print(f"{row['num_live']:>6} live: {row['ms_per_step']:8.3f} ms a step, {row['us_per_sequence']:6.2f} us each")
    print(json.dumps({"benchmark": "scheduler", "context": CONTEXT, "rows": rows}))


def measure(num_live: int) -> dict[str, float]:
    """Median milliseconds of one step with `num_live` decoding sequences."""
    num_steps = num_live * CONTEXT // BATCH_TOKENS + NUM_STEPS + 3  # the first to start decodes while others prefill
    num_pages = num_live * ((CONTEXT + 2 * num_steps) // PAGE_SIZE + 2)
    manager = KVCacheManager(num_pages, PAGE_SIZE, salt="benchmark")
    scheduler = Scheduler(manager, max_num_seqs=num_live, max_batch_tokens=BATCH_TOKENS)
    for i in range(num_live):
        prompt = [(i * 7919 + j) % 32000 for j in range(CONTEXT)]
        submit = Submit(str(i), prompt, Sampling(max_tokens=4096), arrival=0.0)
        scheduler.add(Sequence(i, Request(submit, i, seed=0), 0, list(prompt)))
    while scheduler.num_waiting or not all(s.is_decoding for s in scheduler.sequences()):
        step(scheduler, manager)
    seconds = [step(scheduler, manager) for _ in range(NUM_STEPS)]
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
