"""Draw the training log: `python -m demo.plot RUN training.png`. Needs matplotlib (the `demo` extra)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mode
from typing import Any

SMOOTH = 20  # steps


def smoothed(values: list[float]) -> list[float]:
    """Running mean over the last few steps."""
    return [
        sum(values[max(0, i - SMOOTH) : i + 1]) / len(values[max(0, i - SMOOTH) : i + 1]) for i in range(len(values))
    ]


def row_changes(log: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """(million tokens, row length) where most of the following steps take another length than those before."""
    found, now = [], log[0]["row"]
    for i, entry in enumerate(log):
        if entry["row"] != now and mode(e["row"] for e in log[i : i + SMOOTH]) == entry["row"]:
            now = entry["row"]
            found.append((entry["tokens"] / 1e6, now))
    return found


def draw(progress: dict[str, Any], target: Path) -> None:
    """Losses above, recall by distance below, over tokens seen."""
    from matplotlib.figure import Figure

    log, probes = progress["log"], progress["probes"]
    tokens = [entry["tokens"] / 1e6 for entry in log]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(tokens, smoothed([entry["plain"] for entry in log]), label="every token")
    above.plot(tokens, smoothed([entry["weighted"] for entry in log]), label="weighted (what is minimised)")
    for tokens_before, row in row_changes(log):
        above.axvline(tokens_before, color="grey", linewidth=0.5)
        above.text(tokens_before, above.get_ylim()[1], f" rows of {row}", rotation=90, va="top", fontsize=7)
    above.set_ylabel("loss, nats per token")
    above.legend()
    at = {entry["step"]: entry["tokens"] / 1e6 for entry in log}
    for distance in [key for key in probes[0] if key != "step"] if probes else []:
        below.plot(
            [at[p["step"]] for p in probes], [p[distance] for p in probes], marker=".", label=f"{distance} tokens"
        )
    below.set_ylabel("recall, 8 probes each")
    below.set_xlabel("million training tokens")
    below.legend(ncols=4, fontsize=7)
    figure.savefig(target, dpi=110)


def main() -> None:
    """Draw the plot of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    draw(json.loads((args.run / "log.json").read_text(encoding="utf-8")), args.target)


if __name__ == "__main__":
    main()
