"""Rebuild everything that ships: `python -m demo.build --books DIR`. Trains, exports, packs and draws the loss plot."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def command(module: str, *flags: object) -> list[str]:
    """The command line that runs one step with this interpreter."""
    return [sys.executable, "-m", f"demo.{module}", *map(str, flags)]


def steps(run: Path, books: Path | None, minutes: float, workers: int) -> list[list[str]]:
    """The command lines, in order."""
    shelf = ["--books", books] if books else []
    full, packed = HERE / "checkpoint-fp16", HERE / "checkpoint"
    return [
        command("train", "--out", run, "--minutes", minutes, "--workers", workers, "--seed", 0, *shelf),
        command("export", run, full),
        command("pack", full, packed, *shelf),
        command("plot", run, HERE / "training.png"),
    ]


def main() -> None:
    """Run every step; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, default=None, help="folder of public-domain books (*.txt)")
    parser.add_argument("--run", type=Path, default=Path("demo-run"), help="folder for the training state; resumed")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--workers", type=int, default=2, help="training processes of one thread each")
    args = parser.parse_args()
    for step in steps(args.run, args.books, args.minutes, args.workers):
        subprocess.run(step, check=True)


if __name__ == "__main__":
    main()
