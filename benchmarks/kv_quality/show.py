"""The report as tables in Markdown, and as a plot."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

KINDS = ("chapter", "stories", "facts", "answers", "copy")  # whose recovered shares are shown beside that of all


def tables(found: Row) -> str:
    """Every section."""
    shown = {"policies": _policies, "windows": _windows, "prefill": _prefill, "rounding": _rounding}
    shown |= {"ingredients": _variants, "outliers": _variants}
    parts = [show(found[name]) for name, show in shown.items() if found.get(name)]
    if "policies" in found:
        parts += [_recall(found["policies"])]
        parts += [f"Fewest bits that recover 95 %: {smallest(found['policies'], 0.95)}"]
    parts += [f"Refused: {name}: {reason}" for name, reason in found["refused"].items()]
    return "\n\n".join(part for part in parts if part)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
    return "\n".join(lines)


def _policies(rows: Sequence[Row]) -> str:
    titles = ("policy", "bits", "loss", "+-", "KL", "attention error", "recovered", *KINDS, "copied")
    return _table(
        titles,
        (
            (
                row["policy"],
                _number(row["bits"], ".2f"),
                _number(row["change"], "+.2%"),
                _number(row["change_error"], ".2%"),
                _number(row["kl"], ".1e"),
                _number(row["output_error"], ".1e"),
                *(_recovered(row, kind) for kind in ("all", *KINDS)),
                _number(row["copied"], ".1%"),
            )
            for row in rows
        ),
    )


def _recall(rows: Sequence[Row]) -> str:
    asked = [row for row in rows if "recall" in row]
    if not asked:
        return ""
    spans = [name for name in asked[0]["recall"] if "-" in name]
    alone = [name for name in asked[0]["passkey"] if "-" in name]
    titles = ("policy", *spans, "beyond the window", *(f"passkey {name}" for name in alone))
    return _table(
        titles,
        (
            (
                row["policy"],
                *(_number(row["recall"][name], ".0%") for name in spans),
                _number(row["recall"]["beyond"], ".1%"),
                *(_number(row["passkey"][name], ".0%") for name in alone),
            )
            for row in asked
        ),
    )


def _windows(rows: Sequence[Row]) -> str:
    titles = ("policy", "window", "sinks", "loss", "KL", "attention error", "recovered", "copied")
    return _table(
        titles,
        (
            (
                row["policy"].split(":w")[0],
                str(row["window"]),
                str(row["sinks"]),
                _number(row["change"], "+.2%"),
                _number(row["kl"], ".1e"),
                _number(row["output_error"], ".1e"),
                _recovered(row, "all"),
                _number(row["copied"], ".1%"),
            )
            for row in rows
        ),
    )


def _prefill(rows: Sequence[Row]) -> str:
    return _table(
        ("policy", "bits", "prompts", "loss of answers", "+-", "recall beyond the window"),
        (
            (
                row["policy"],
                _number(row["bits"], ".2f"),
                row["prefill"],
                _number(row["change"], "+.2%"),
                _number(row["change_error"], ".2%"),
                _number(row["recall"]["beyond"] if "recall" in row else None, ".1%"),
            )
            for row in rows
        ),
    )


def _variants(rows: Sequence[Row]) -> str:
    titles = ("policy", "outliers", "codec", "attention error", "loss", "KL", "recovered")
    return _table(
        titles,
        (
            (
                row["policy"],
                f"{row['factor']:g} times",
                row["variant"],
                _number(row["output_error"], ".1e"),
                _number(row["change"], "+.2%"),
                _number(row["kl"], ".1e"),
                _recovered(row, "all"),
            )
            for row in rows
        ),
    )


def _rounding(rows: Sequence[Row]) -> str:
    titles = [name for name in rows[0] if name not in ("bits", "group")]
    return _table(
        ("bits", "group", *titles),
        ((f"{row['bits']:g}", str(row["group"]), *(_number(row[name], ".2f") for name in titles)) for row in rows),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _recovered(row: Row, kind: str) -> str:
    return _number(row.get("recovered", {}).get(kind), ".0%")


def draw(found: Row, target: Path) -> None:
    """What is recovered over the bits of a page, and recall by distance."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "kv_quality", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_recovered(left, found["policies"])
        _draw_recall(right, found["policies"])
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def _draw_recovered(axes: Any, rows: Sequence[Row]) -> None:
    for label, wanted in (("calibrated", True), ("rotated, no calibration", False)):
        chosen = [
            (row["bits"], row["recovered"]["all"], row["policy"])
            for row in rows
            if row["bits"] and row["bits"] < 9 and row.get("recovered", {}).get("all") is not None
            if row["policy"].startswith("skvq:") == wanted
        ]
        axes.scatter([bits for bits, _, _ in chosen], [100 * share for _, share, _ in chosen], label=label, s=14)
        for bits, share, name in chosen:
            axes.annotate(name.removeprefix("skvq:"), (bits, 100 * share), (3, 3), textcoords="offset points", size=6)
    axes.axhline(95, color="grey", linewidth=0.5)
    axes.set_xlabel("bits for each number of a page")
    axes.set_ylabel("recovered of what dropping history costs, %")
    axes.legend()


def _draw_recall(axes: Any, rows: Sequence[Row]) -> None:
    chosen = ("f16", "k4v4", "k2v2", "skvq:k2v2", "skvq:k2v2/0,1=skvq:k4v2", "dropped")
    for row in rows:
        if row["policy"] in chosen and "recall" in row:
            spans = [name for name in row["recall"] if "-" in name and not name.startswith("0-")]  # beyond the window
            axes.plot(spans, [100 * row["recall"][name] for name in spans], marker=".", label=row["policy"])
    axes.set_xlabel("tokens between fact and question")
    axes.set_ylabel("answered right, %")
    if axes.lines:
        axes.legend()


def smallest(rows: Sequence[Row], least: float) -> Row | None:
    """The policy of fewest bits that recovers at least this share of what dropping history costs."""
    enough = [row for row in rows if row["bits"] and (row.get("recovered", {}).get("all") or 0) >= least]
    best = min(enough, key=lambda row: float(row["bits"]), default=None)
    return None if best is None else {key: best[key] for key in ("policy", "bits")}
