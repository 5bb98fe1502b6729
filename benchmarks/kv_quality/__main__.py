"""What a quantized cache costs in quality:  python -m benchmarks.kv_quality [--model demo|FOLDER] [--quick] [--json]

Everything runs on the engine in this process, one thread, activations as the checkpoint has them. Against a cache of
float32, on texts that the model was not trained on:

    policies     loss through the cache (prompt log-probabilities), KL of the next-token distributions, error of
                 attention outputs; `recovered`, the share of what dropping all history but window and sinks costs that
                 the policy does not lose; questions about facts, by distance, with other facts of the same form in
                 between (recall) or without (passkey); a passage read for the second time (copy)
    windows      the same without questions, over windows and sinks
    prefill      loss of answers whose prompt has read by window, or all of itself in high precision (--kv-prefill)
    ingredients  the codec of one policy made of reorder, clip, rotation, by itself and together
    outliers     likewise, with channels that stand out and that the float model does not notice
    rounding     squared error over that of SKVQ's published quantizer, which rounds scales after taking codes

Calibrated policies (skvq:) are calibrated first on stories and facts of the training split. The last line is JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.kv_quality import errors, run
from benchmarks.kv_quality.show import draw, tables
from benchmarks.kv_quality.texts import Sizes

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
CALIBRATED = ("skvq:k2v2", "skvq:k2v2/0,1=skvq:k4v2", "skvq:k2v1.5", "skvq:k4v2")
WIDER = ("k4v4/0,1=k8v8", "k2v2/0,1=k8v4", "skvq:k2v2/0=skvq:k4v2")
GRID = run.Grid(
    policies=(
        *("f16", "k8v8", "k4v4", "k4v16", "k16v4", "k2v16", "k16v2", "k4v2", "k3v2", "k2v2", "k2v1.5"),
        *WIDER,
        *("k2v2/0,1=k4v2", "skvq:k2v2", "skvq:k2v2/0,1=skvq:k4v2", "skvq:k2v1.5", "skvq:k3v2", "skvq:k4v2"),
    ),
    prefilled=("k4v4", "k2v2", "skvq:k2v2"),
    asked=("f16", "k4v4", "k4v2", "k2v2", "k2v1.5", "k2v2/0,1=k4v2", *WIDER, *CALIBRATED),
    windows=(0, 16, 32, 64, 128),
    sinks=(0, 1, 4, 16),
    swept=("skvq:k2v2", "k4v4"),
    ingredients="k2v2",
    tall=("k2v2",),
    variants=errors.VARIANTS,
)
SECTIONS: dict[str, Callable[[run.Run], list[dict[str, Any]]]] = {
    "rounding": run.rounding,
    "policies": run.policies,
    "windows": run.windows,
    "prefill": run.prefill,
    "ingredients": run.ingredients,
    "outliers": run.with_outliers,
}
QUICK = run.Grid(
    policies=("f16", "k4v4", "skvq:k2v2"),
    prefilled=("k4v4",),
    asked=("f16", "k4v4", "skvq:k2v2"),
    windows=(0,),
    sinks=(4,),
    swept=("k4v4",),
    ingredients="k2v2",
    tall=("k2v2",),
    variants=(errors.VARIANTS[0], errors.VARIANTS[5]),
)
SIZES = Sizes(
    length=1024,
    num_texts=2,
    num_contexts=4,
    num_questions=32,
    num_passkeys=3,
    distances=(256, 1024),
    context=2112,
    calibration=8192,
)
QUICK_SIZES = Sizes(
    length=448,
    num_texts=1,
    num_contexts=1,
    num_questions=4,
    num_passkeys=1,
    distances=(256,),
    context=512,
    calibration=1024,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="what a quantized cache costs in quality")
    parser.add_argument("--model", default="demo", help="demo, or a folder with a checkpoint")
    parser.add_argument("--quick", action="store_true", help="a few policies and little text, in less than a minute")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS), help="the sections to measure")
    parser.add_argument("--policies", nargs="+", help="measure these in place of the usual ones, questions included")
    parser.add_argument("--artifacts", type=Path, help="a folder where calibrations are kept and found again")
    parser.add_argument("--plot", type=Path, help="draw to this file, .svg or .png; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    args = parser.parse_args()
    if args.plot and "policies" not in args.only:
        parser.error("--plot draws the section policies: add it to --only")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.artifacts or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        grid, sizes = (QUICK, QUICK_SIZES) if args.quick else (GRID, SIZES)
        if args.policies:
            grid = replace(grid, policies=tuple(args.policies), asked=tuple(args.policies))
        found = measure(DEMO if args.model == "demo" else Path(args.model), grid, sizes, folder, args.only)
    if args.plot:
        draw(found, args.plot)
    if not args.json:
        print(tables(found))
    print(json.dumps(found))


def measure(model: Path, grid: run.Grid, sizes: Sizes, artifacts: Path, sections: Sequence[str]) -> dict[str, Any]:
    """The sections asked for. Texts become shorter where the model's context is."""
    made = run.make(model, grid, sizes, artifacts, recall=model.resolve() == DEMO.resolve())
    found: dict[str, Any] = {"benchmark": "kv_quality", "model": model.name if model != DEMO else "demo"}
    found["tokens"] = {"texts": len(made.held_out), "length": made.sizes.length}
    for section in sections:
        found[section] = SECTIONS[section](made)
    found["refused"] = made.refused
    return found


if __name__ == "__main__":
    main()
