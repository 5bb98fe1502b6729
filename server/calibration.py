"""nibble calibrate on the screen: a bar while layers are searched, then what each does and what it gained."""

import shlex

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.messages import CalibrationReport, Loading


class CalibrationBar:
    """Progress by layers."""

    def __init__(self, console: Console, name: str) -> None:
        columns = (TextColumn("[bold]Calibrating {task.description}"), BarColumn(), MofNCompleteColumn())
        clock, quiet = TimeElapsedColumn(), not console.is_terminal
        self._progress = Progress(*columns, clock, console=console, transient=True, disable=quiet)
        self._task = self._progress.add_task(name, total=None)

    def start(self) -> None:
        self._progress.start()

    def update(self, layers: Loading) -> None:
        self._progress.update(self._task, completed=layers.done_bytes, total=layers.total_bytes)

    def stop(self) -> None:
        self._progress.stop()


def print_calibration(console: Console, report: CalibrationReport, model: str) -> None:
    """The search layer by layer, and how to serve what it found."""
    table = Table(box=None, padding=(0, 2), header_style="bold cyan")
    for title in ("", "keys", "values", "error", "calibrated"):
        table.add_column(title, justify="right" if title in ("error", "calibrated") else "left", no_wrap=True)
    for i, layer in enumerate(report.layers):
        errors = (f"{layer.error_before:.5f}", f"{layer.error_after:.5f}")
        table.add_row(f"{i} {layer.widths}", layer.keys, layer.values, *errors)
    console.print(table)
    console.print(
        "\nErrors are |o' - o|^2 / |o|^2 of attention outputs, quantized by themselves, on text held out from the "
        f"search.\n{report.policy}, calibrated on {report.provenance} in {report.seconds:.0f} s.\n",
        soft_wrap=True,
        markup=False,
    )
    if report.wider is not None:
        console.print(
            f"A few layers have most of the error. With more bits for their keys: --policy {report.wider}\n",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
    command = ["nibble", "serve", model, "--kv", report.policy, "--kv-calibration", report.artifact]
    console.print(shlex.join(command), soft_wrap=True, markup=False, highlight=False)
