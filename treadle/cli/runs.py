"""`treadle runs`: list, show, compare and plot what has been trained."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from treadle.errors import RunError
from treadle.tracking import Runs, load_environment, load_metrics, load_samples
from treadle.tracking.files import json_page
from treadle.tracking.index import INDEX_FILE, records
from treadle.tracking.query import FACTS, Condition, RunRecord
from treadle.tracking.runs import LATEST
from treadle.tracking.terminal import chart, sparkline

app = typer.Typer(no_args_is_help=True, help="List, show, compare and plot runs.")

STATE_STYLES = {
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "failed": "red",
    "died": "red",
    "unreadable": "red",
}
# What tells two runs apart at a glance; the rest is in config.yaml.
HIGHLIGHTS = (
    *("dim", "heads", "kv_heads", "vocab_size", "lr", "weight_decay", "batch_size", "sequence_length"),
    *("steps", "seed", "precision"),
)
SPARKLINES = ("grad_norm", "lr", "tokens_per_second", "mfu", "memory_gib")
FROM_ZERO = ("tokens_per_second", "mfu", "memory_gib")
MISSING = "-"


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion: the ids under --root, newest first, and `latest`."""
    try:
        ids = [run.id for run in Runs(ctx.params.get("root") or "runs").list()]
    except Exception:  # whatever is wrong with the folder, a completion must not print into the user's line
        return []
    return [run_id for run_id in [*ids, *([LATEST] if ids else [])] if run_id.startswith(incomplete)]


Root = Annotated[Path, typer.Option("--root", help="Folder that holds the run folders.", is_eager=True)]
RUN_HELP = "A run: its folder, id, a unique beginning of its id, or 'latest'."
RunName = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP, autocompletion=complete_run)]
RunNames = Annotated[list[str], typer.Argument(metavar="RUN...", help=RUN_HELP, autocompletion=complete_run)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DEFAULT_ROOT = Path("runs")


@app.command("list")
def list_runs(
    state: Annotated[str | None, typer.Option(help=f"One of {', '.join(STATE_STYLES)}.")] = None,
    name: Annotated[str | None, typer.Option(help="Only ids that contain this text.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Condition on a config key, summary value or metric: optimizer.lr=3e-4, 'loss<2'. Repeatable."
        ),
    ] = None,
    sort: Annotated[str, typer.Option(help="Key to sort by, with a leading - for descending.")] = "-started",
    limit: Annotated[int | None, typer.Option(min=1, help="Show at most this many.")] = None,
    root: Root = DEFAULT_ROOT,
    as_json: Json = False,
) -> None:
    """List runs, newest first.

    Examples:

        treadle runs list --state finished --where 'evaluate/loss<3.2' --sort evaluate/loss

        treadle runs list --where optimizer.lr=3e-4 --limit 10
    """
    if state is not None and state not in STATE_STYLES:
        raise RunError(f"state '{state}': expected one of {', '.join(STATE_STYLES)}.")
    runs = Runs(root).list(state, name, where or (), sort, limit)
    if as_json:
        _print_json([run.to_json() for run in runs])
        return
    asked = [*(Condition.parse(text).key for text in where or ()), sort.removeprefix("-")]
    extra = [key for key in dict.fromkeys(asked) if key not in (*FACTS, "loss", "evaluate/loss")]
    table = _table("run", "state", "step", "ran", "loss", "evaluate/loss", *extra)
    for run in runs:
        cells = (str(run.step), _duration(run.elapsed), *(_cell(run, key) for key in ("loss", "evaluate/loss", *extra)))
        table.add_row(run.id, _state(run), *cells)
    console = _console()
    console.print(table)
    if not runs:
        console.print(f"no such runs in {root}")


@app.command()
def show(run: RunName = "latest", root: Root = DEFAULT_ROOT, as_json: Json = False) -> None:
    """Show one run: state, configuration, latest metrics and their course, last sample, environment."""
    record = Runs(root).find(run)
    samples = load_samples(record.folder)
    try:
        environment = load_environment(record.folder)
    except RunError:  # a folder that was copied in part still shows what it has
        environment = {}
    if as_json:
        last = samples[-1] if samples else None
        _print_json({**record.to_json(), "last_sample": last, "environment": environment})
        return
    console = _console()
    _print_status(console, record)
    _print_config(console, record)
    _print_metrics(console, record)
    if samples:
        _heading(console, f"sample at step {samples[-1]['step']}")
        console.print(f"{samples[-1]['prompt']}{samples[-1]['text']}")
    if environment:
        _print_environment(console, environment)


@app.command()
def compare(runs: RunNames, root: Root = DEFAULT_ROOT, as_json: Json = False) -> None:
    """Compare runs: the configuration keys in which they differ, then their results."""
    found = [Runs(root).find(reference) for reference in runs]
    if len({run.folder.absolute() for run in found}) < 2:
        raise RunError(f"comparing needs two different runs, got {', '.join(run.id for run in found)}.")
    keys = dict.fromkeys(key for run in found for key in run.config)
    differing = [key for key in keys if any(_config_cell(run, key) != _config_cell(found[0], key) for run in found)]
    # The latest metrics stand in for a summary that a run which has not finished does not have.
    results = dict.fromkeys(key for run in found for key in (*run.summary, *run.metrics))
    if as_json:
        differences = {key: {run.id: run.config.get(key) for run in found} for key in differing}
        values = {key: {run.id: run.value(key) for run in found} for key in ("state", "step", "elapsed", *results)}
        _print_json({"config": differences, "results": values})
        return
    console = _console()
    table = _table("config", *(run.id for run in found))
    for key in differing:
        table.add_row(key, *(_config_cell(run, key) for run in found))
    console.print(table if differing else "the configurations are equal")
    table = _table("result", *(run.id for run in found))
    table.add_row("state", *map(_state, found))
    table.add_row("step", *(str(run.step) for run in found))
    table.add_row("ran", *(_duration(run.elapsed) for run in found))
    for key in results:
        table.add_row(key, *(_cell(run, key) for run in found))
    console.print(table)


@app.command()
def plot(
    runs: RunNames,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric, such as loss or evaluate/loss. Repeatable, a panel each.")
    ] = None,
    x: Annotated[str, typer.Option("--x", help="step, tokens, time or flops.")] = "step",
    smooth: Annotated[float, typer.Option(help="Moving average, 0 (none) to below 1; 0.9 averages ten records.")] = 0.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .png, .pdf or .svg.")] = Path(
        "runs.png"
    ),
    root: Root = DEFAULT_ROOT,
) -> None:
    """Draw runs into one figure. One run without --metric gets the training plot: loss, learning rate, speed."""
    from treadle.tracking.plot import plot_runs, plot_training

    folders = [Runs(root).find(reference).folder for reference in runs]
    if len(folders) == 1 and metric is None and x == "step":
        written = plot_training(folders[0], output)
    else:
        written = plot_runs(folders, metric or ["loss"], x, smooth, output=output)
    typer.echo(f"wrote {written}")


@app.command()
def index(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Forget the index and read every folder again.")] = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Bring the index up to date. `list` does so by itself; the index is a cache and may be deleted."""
    if rebuild:
        (root / INDEX_FILE).unlink(missing_ok=True)
    typer.echo(f"{len(records(root))} runs in {root}")


def _print_status(console: Console, run: RunRecord) -> None:
    resumed = f", resumed {run.resumes}x" if run.resumes else ""
    progress = f"  step {run.step}, ran {_duration(run.elapsed)}{resumed}"
    console.print(Text.assemble((run.id, "bold"), "  ", _state(run), progress))
    times = f"started {run.started[:19]}, last sign {run.updated[:19]} UTC"
    console.print(Text(f"{run.folder}  {times}", style="dim"))
    if run.error:
        console.print(run.error, style="red")


def _print_config(console: Console, run: RunRecord) -> None:
    """A few keys in the order of the file; repeated layers are told by their first."""
    first = [key for key in run.config if run.config[key] is not None and not re.search(r"\[[1-9]", key)]
    chosen = {key: run.config[key] for key in first if key.rpartition(".")[2] in HIGHLIGHTS}
    if chosen:
        _heading(console, "configuration (all of it: config.yaml)")
        console.print(
            "  ".join(f"{key}={_text(value)}" for key, value in chosen.items()), markup=False, highlight=False
        )


def _print_metrics(console: Console, run: RunRecord) -> None:
    columns = load_metrics(run.folder, "train")
    losses = [value for value in columns.get("loss", []) if value is not None]
    if losses:
        _heading(console, f"loss, {_text(losses[0])} at step {columns['step'][0]} to {_text(losses[-1])}")
        for line in chart(losses):
            console.print(line, style="blue")
    shown = [name for name in SPARKLINES if name in columns]
    names = [*(name for name in run.metrics if name not in (*shown, "loss")), *run.summary]
    width = max(map(len, [*shown, *names]), default=0)
    _heading(console, "metrics")
    for name in shown:
        curve = sparkline(columns[name], from_zero=name in FROM_ZERO)
        console.print(f"{name:<{width}}  {_cell(run, name):>9}  {curve}")
    for name in dict.fromkeys(names):
        console.print(f"{name:<{width}}  {_cell(run, name):>9}")


def _print_environment(console: Console, environment: dict[str, Any]) -> None:
    git, cpu, gpus = environment.get("git"), environment.get("cpu") or {}, environment.get("gpus") or []
    _heading(console, "environment")
    console.print(f"$ {environment.get('command', '')}")
    console.print(", ".join(f"{name} {environment.get(name)}" for name in ("treadle", "torch", "python")))
    if git:
        console.print(f"git {git['revision'][:12]} on {git['branch']}{' with changes' if git['dirty'] else ''}")
    console.print(f"{cpu.get('model')}, {cpu.get('cores')} cores, {cpu.get('memory_gib')} GiB")
    if gpus:
        console.print(f"{len(gpus)} x {gpus[0]['name']}, {gpus[0]['memory_gib']} GiB, driver {gpus[0]['driver']}")


def _console() -> Console:
    # What is printed is the user's: brackets in it are no markup. Into a pipe or a file nothing is cut: 80 columns
    # would hide the ids that the next command needs.
    return Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False, emoji=False)


def _table(first: str, *rest: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in rest:
        table.add_column(name, justify="left" if name == "state" else "right", overflow="fold")
    return table


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _state(run: RunRecord) -> Text:
    return Text(run.state, style=STATE_STYLES.get(run.state, ""))


def _print_json(value: Any) -> None:
    typer.echo(json_page(json.loads(json.dumps(value, default=str))).decode(), nl=False)


def _cell(run: RunRecord, key: str) -> str:
    return _text(run.value(key)) if run.has(key) else MISSING


def _config_cell(run: RunRecord, key: str) -> str:
    # Written in full: two learning rates must not look equal because their first digits are.
    return json.dumps(run.config[key], default=str).strip('"') if key in run.config else MISSING


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
