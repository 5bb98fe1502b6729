"""What a person sees who starts the server: a bar while weights are read, then one screen of facts."""

import json
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from engine.messages import Conversion, Inspection, Loading, PlanSummary

UNITS = ("B", "KiB", "MiB", "GiB")


def nibble_version() -> str:
    try:
        return version("nibble-server")
    except PackageNotFoundError:
        return "0 (not installed)"


@dataclass(frozen=True)
class Door:
    """Where a server is asked, and how."""

    url: str
    facts: tuple[tuple[str, str], ...] = ()  # titles and what was decided of access, logs and metrics
    needs_key: bool = False
    certificate: str | None = None


class LoadingBar:
    """Progress of reading weights. `update` may be called from any thread."""

    def __init__(self, console: Console, name: str, verb: str = "Loading") -> None:
        columns = (TextColumn(f"[bold]{verb} {{task.description}}"), BarColumn(), DownloadColumn(binary_units=True))
        self.console = console
        # In a log file it would leave nothing but an empty line.
        speed, quiet = TransferSpeedColumn(), not console.is_terminal
        self._progress = Progress(*columns, speed, console=console, transient=True, disable=quiet)
        self._task = self._progress.add_task(name, total=None)

    def start(self) -> None:
        self._progress.start()

    def update(self, loading: Loading) -> None:
        self._progress.update(self._task, completed=loading.done_bytes, total=loading.total_bytes or None)

    def stop(self) -> None:
        self._progress.stop()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()


def print_start(console: Console, plan: PlanSummary, name: str, door: Door, chat: bool) -> None:
    """The facts of a server that is ready. `chat`: whether the model has a chat template."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    address = ("address", f"{door.url}   (API: {door.url}/docs)")
    for title, fact in (*_facts(plan, name), *door.facts, address):
        table.add_row(title, Text(fact, overflow="fold"))
    console.print(f"[bold]Nibble {nibble_version()}[/bold]\n")
    console.print(table)
    console.print("\nTry it:\n")
    console.print(curl(door, name, chat), soft_wrap=True, markup=False, highlight=False)


def print_note(console: Console, text: str) -> None:
    """What a user should know before something long begins."""
    console.print(f"[bold cyan]note:[/bold cyan] {escape(text)}", soft_wrap=True, highlight=False)


def print_inspection(console: Console, inspection: Inspection) -> None:
    """What a decode step reads, layer by layer, and how fast that can be."""
    plan, total = inspection.plan, inspection.weight_bytes_per_token
    layers = Table(box=None, padding=(0, 2), header_style="bold cyan")
    refused = any(use.refusals for use in plan.kernels)
    for title in ("layers", "kernel", "read per token", "share", *(["why no faster kernel"] if refused else [])):
        layers.add_column(title, justify="right" if title in ("read per token", "share") else "left", overflow="fold")
    for use in plan.kernels:
        read = (size(use.num_bytes), f"{use.num_bytes / total:.0%}") if use.num_bytes else ("", "")
        layers.add_row(use.what, use.kernel, *read, *([use.refusals] if refused else []))
    console.print(f"[bold]{plan.architecture}[/bold], {escape(plan.format)}, from {escape(plan.model)}\n")
    console.print(layers)
    console.print()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold cyan", no_wrap=True)
    facts.add_column()
    for title, fact in _roofline(inspection):
        facts.add_row(title, Text(fact, overflow="fold"))
    console.print(facts)


def print_conversion(console: Console, conversion: Conversion) -> None:
    """What became of every linear layer, and how to serve it."""
    table = Table(box=None, padding=(0, 2), header_style="bold cyan")
    for title in ("layer", "now", "bits a weight", "error"):
        table.add_column(title, justify="left" if title in ("layer", "now") else "right", overflow="fold")
    for layer in conversion.layers:
        error = "none" if layer.error == 0 else f"{layer.error:.2%}"
        table.add_row(layer.name, layer.what, f"{layer.bits:.2f}", error)
    console.print(table)
    num_weights = sum(layer.num_weights for layer in conversion.layers)
    bits = 8 * sum(layer.num_bytes for layer in conversion.layers) / max(1, num_weights)
    resumed = f", {conversion.num_resumed} of {conversion.num_shards} shards from an earlier run"
    sizes = f"{size(conversion.source_bytes)} -> {size(conversion.num_bytes)}"
    console.print(
        f"\n{len(conversion.layers)} linear layers, {bits:.2f} bits a weight; all tensors {sizes}"
        f"{resumed if conversion.num_resumed else ''}\n",
        soft_wrap=True,
    )
    console.print(f"nibble serve {shlex.quote(conversion.destination)}", soft_wrap=True, markup=False, highlight=False)


def _roofline(inspection: Inspection) -> list[tuple[str, str]]:
    plan = inspection.plan
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    facts = [
        ("weights", f"{size(inspection.weight_bytes_per_token)} read for every step"),
        *_cache(inspection),
    ]
    if inspection.bandwidth is None:
        facts.append(("bandwidth", "not measured: that takes the C++ kernels and a model on the CPU"))
    else:
        facts.append(("bandwidth", f"{inspection.bandwidth / 1e9:.1f} GB/s read by {threads}, {inspection.isa}"))
    measured, roof = plan.decode_tokens_per_s, inspection.predicted_tokens_per_s(0)
    of_roof = f", {measured / roof:.0%} of it" if roof else ""
    for context_len in sorted({0, 4096, plan.max_model_len}):
        at = inspection.predicted_tokens_per_s(context_len)
        if at is not None and context_len <= plan.max_model_len:
            facts.append(("roof", f"{at:,.1f} tokens/s for one sequence, {context_len:,} tokens in the cache"))
    facts.append(("measured", f"{measured:,.1f} tokens/s with an empty cache{of_roof}"))
    return [*facts, *(("note", note) for note in plan.notes)]


def _cache(inspection: Inspection) -> list[tuple[str, str]]:
    """What the cache takes, beside one of float16."""
    plan, kv = inspection.plan, inspection.kv
    fit = f"{kv.num_tokens:,} tokens fit in {size(kv.num_bytes)}"
    if kv.bits >= 16:
        return [("KV cache", f"{plan.kv_policy}, {size(plan.kv_bytes_per_token)} a token; {fit}")]
    each = f"{size(plan.kv_bytes_per_token)} a token{_bits(plan)}; f16 {size(kv.f16_bytes_per_token)}"
    facts = [
        ("KV cache", f"{plan.kv_policy}, {each}"),
        ("", f"{fit}; {kv.num_f16_tokens:,} in f16"),
    ]
    for one in kv.sequences:
        parts = f"{size(one.page_bytes)} of pages and {size(one.recent_bytes)} of recent tokens in f16"
        whole = f"{one.bits:.3g} bits, f16 {size(one.f16_bytes)}"
        facts.append((f"{one.num_tokens:,} tokens", f"{parts}: {whole}"))
    if kv.break_even_tokens:
        facts.append(("break-even", f"a sequence takes less than in f16 from {kv.break_even_tokens:,} tokens on"))
    return facts


def _bits(plan: PlanSummary) -> str:
    """What a quantized cache takes for each number."""
    return f", {plan.kv_bits:.3g} bits with scales" if 0 < plan.kv_bits < 16 else ""


def _facts(plan: PlanSummary, name: str) -> list[tuple[str, str]]:
    tokens = plan.num_pages * plan.page_size
    prefix = "on" if plan.prefix_caching else "off"
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    facts = [
        ("model", f"{name}: {plan.architecture}, {plan.format}, {size(plan.weight_bytes)} of weights"),
        ("from", plan.model),
        ("device", f"{plan.device}, {plan.dtype} activations, {threads}"),
    ]
    facts += [("kernel", line) for line in _kernels(plan)]
    facts += [
        (
            "KV cache",
            f"{plan.kv_policy}{_bits(plan)}, {size(plan.kv_bytes)}, prefix caching {prefix}",
        ),
        ("", f"{tokens:,} tokens fit: {plan.num_pages:,} pages of {plan.page_size}{_parts(plan)}"),
        *([("", f"{size(plan.swap_bytes)} of host memory to swap to")] if plan.swap_bytes else []),
        ("context", f"{plan.max_model_len:,} tokens at most for one request, prompt and answer"),
        ("batch", f"{plan.max_num_seqs} sequences, {plan.max_batch_tokens} tokens a step"),
        ("speed", f"{plan.decode_tokens_per_s:,.1f} tokens/s for one sequence; loaded in {plan.load_seconds:.1f} s"),
    ]
    return [*facts, *(("note", note) for note in plan.notes)]


def _parts(plan: PlanSummary) -> str:
    """What the memory of a cache with two kinds of pages is divided into."""
    if not plan.recent_bytes:
        return ""
    return f" in {size(plan.kv_bytes - plan.recent_bytes)}; {size(plan.recent_bytes)} for recent tokens in f16"


def _kernels(plan: PlanSummary) -> list[str]:
    """What runs on each kernel, and why not on others; one line for all that have both in common."""
    groups: dict[tuple[str, str], list[str]] = {}
    for use in plan.kernels:
        groups.setdefault((use.kernel, use.refusals), []).append(use.what)
    return [
        f"{', '.join(whats)}: {kernel}" + (f" ({refusals})" if refusals else "")
        for (kernel, refusals), whats in groups.items()
    ]


def curl(door: Door, name: str, chat: bool) -> str:
    """A request ready to paste; a key stands in it as $KEY."""
    body: dict[str, object]
    if chat:
        path, body = "chat/completions", {"messages": [{"role": "user", "content": "Tell me a story."}]}
    else:
        path, body = "completions", {"prompt": "Once upon a time"}
    body = {"model": name} | body | {"max_tokens": 64}
    quoted = json.dumps(body).replace("'", "'\\''")
    key = ' -H "Authorization: Bearer $KEY"' if door.needs_key else ""
    trust = "" if door.certificate is None else f" --cacert {shlex.quote(door.certificate)}"
    return f"curl -N {door.url}/v1/{path}{trust}{key} -H 'Content-Type: application/json' \\\n  -d '{quoted}'"


def size(num_bytes: float) -> str:
    """12.3 MiB."""
    for unit in UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} {UNITS[-1]}"
