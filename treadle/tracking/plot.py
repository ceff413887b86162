"""Figures of runs: some metrics of several runs, or the whole course of one."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.errors import RunError
from treadle.tracking.read import load_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"step": "step", "tokens": "tokens", "time": "running time", "flops": "FLOPs"}
TITLES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens / s",
    "mfu": "MFU",
    "memory_gib": "memory (GiB)",
    "bits_per_byte": "bits per byte",
}
# Okabe and Ito's palette: told apart by all readers, on paper too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#444444")
SMALL_PANELS = {"lr": COLORS[2], "grad_norm": COLORS[3], "tokens_per_second": COLORS[6]}
INK, GRID = "#333333", "#E6E6E6"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}
# The first steps of a loss fall from ln(vocabulary) and would flatten all that follows.
WARMUP_SHARE = 0.08


def load_series(folder: Path, metric: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """One metric against `x`, without the records that lack it: float64 arrays of one length.

    `metric` is a name of the training records (`loss`) or `<kind>/<name>` (`evaluate/loss`). `x` is step, time (s),
    tokens or flops; the last two are interpolated from the training records where a kind does not log them.
    Raises RunError if the run has no such metric.
    """
    if x not in AXES:
        raise RunError(f"x axis '{x}': expected one of {', '.join(AXES)}.")
    kind, _, name = metric.rpartition("/")
    columns = load_metrics(folder, kind or "train")
    values = columns.get(name)
    if values is None or name in ("step", "time", "kind"):
        known = ", ".join(sorted(_metric_names(folder))) or "none"
        raise RunError(f"{folder}: no metric '{metric}'. Logged: {known}.")
    here = [row for row, value in enumerate(values) if value is not None]
    steps = np.array([columns["step"][row] for row in here], dtype=np.float64)
    y = np.array([values[row] for row in here], dtype=np.float64)
    if x == "step":
        return steps, y
    if x in columns and all(columns[x][row] is not None for row in here):
        return np.array([columns[x][row] for row in here], dtype=np.float64), y
    return np.interp(steps, *load_series(folder, x)), y


def _metric_names(folder: Path) -> set[str]:
    columns = load_metrics(folder)
    names = set(columns) - {"step", "time", "kind"}
    rows = range(len(columns["step"]))
    pairs = {(columns["kind"][row], name) for name in names for row in rows if columns[name][row] is not None}
    return {name if kind == "train" else f"{kind}/{name}" for kind, name in pairs}


def smoothed(y: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving average, debiased as in Adam (Kingma and Ba 2015): the first value is the first of `y`.

    `weight` in [0, 1) is the share kept of the past. A value that is not finite stays in its place and leaves the
    average alone.
    """
    if not 0 <= weight < 1:
        raise RunError(f"smoothing {weight}: expected at least 0 and below 1.")
    result = y.copy()
    total = mass = 0.0
    for position in np.flatnonzero(np.isfinite(y)):
        total = weight * total + (1 - weight) * y[position]
        mass = weight * mass + (1 - weight)
        result[position] = total / mass
    return result


def plot_runs(
    runs: Sequence[Path], metrics: Sequence[str], x: str = "step", smooth: float = 0.0, *, output: Path
) -> Path:
    """Each metric in a panel, each run a color; unsmoothed values stay visible behind. The suffix sets the format.

    `x` is step, tokens, time or flops. Raises RunError for a metric that a run lacks and for an unknown suffix.
    """
    with drawn(output, width=min(6.4 * len(metrics), 15), height=4.2) as figure:
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        labels = _labels(runs)
        for panel, metric in zip(panels, metrics, strict=True):
            series = [load_series(folder, metric, x) for folder in runs]
            unit = _label_x(panel, x, longest=max((xs.max(initial=0.0) for xs, _ in series), default=0.0))
            for number, (xs, ys) in enumerate(series):
                # Evaluations are few and averages already: each gets a mark, none is smoothed.
                few = "/" in metric
                color = COLORS[number % len(COLORS)]
                _curve(panel, xs / unit, ys, color, 0.0 if few else smooth, labels[number], "o" if few else None)
            _title(panel, metric)
            _trim_start(panel, metric)
        if len(runs) > 1:
            panels[0].legend(loc="best")
        else:
            figure.suptitle(labels[0], x=0.01, ha="left", fontsize=12)
    return output


def plot_training(folder: Path, output: Path) -> Path:
    """The course of one run: training and evaluation loss; learning rate, gradient norm and speed beside them."""
    names = _metric_names(folder)
    evaluations = sorted(name for name in names if name.startswith("evaluate/") and name.endswith("/loss"))
    small = [name for name in SMALL_PANELS if name in names]
    if "loss" not in names and not evaluations:
        raise RunError(f"{folder}: no loss has been logged yet.")
    with drawn(output, width=11 if small else 7, height=5.2) as figure:
        grid = figure.add_gridspec(max(len(small), 1), 2 if small else 1, width_ratios=[2.1, 1] if small else None)
        main = figure.add_subplot(grid[:, 0])
        if "loss" in names:
            steps, ys = load_series(folder, "loss")
            _curve(main, steps, ys, COLORS[0], _gentle(len(ys)), "training")
        for number, name in enumerate(evaluations):
            label = "evaluation" if len(evaluations) == 1 else name.removesuffix("/loss")
            _curve(main, *load_series(folder, name), COLORS[1 + number % (len(COLORS) - 1)], 0.0, label, "o")
        _label_x(main, "step")
        _title(main, "loss")
        _trim_start(main, "loss")
        if evaluations:
            main.legend(loc="upper right")
        for row, panel_metric in enumerate(small):
            _small_panel(figure.add_subplot(grid[row, 1]), folder, panel_metric, last=row == len(small) - 1)
        figure.suptitle(Path(folder).absolute().name, x=0.01, ha="left", fontsize=12)
    return output


def _small_panel(panel: "Axes", folder: Path, metric: str, last: bool) -> None:
    steps, ys = load_series(folder, metric)
    _curve(panel, steps, ys, SMALL_PANELS[metric], _gentle(len(ys)) if metric != "lr" else 0.0)
    _label_x(panel, "step")
    panel.locator_params(axis="x", nbins=5)
    if not last:
        panel.tick_params(labelbottom=False)
        panel.set_xlabel("")
    _title(panel, metric)
    if metric == "tokens_per_second":  # a wobble of one percent must not look like a collapse
        panel.set_ylim(bottom=0)


def _gentle(count: int) -> float:
    """Average over about half a percent of the curve: enough against noise, too little to lag behind."""
    return max(0.0, 1 - 200 / count) if count else 0.0


def _curve(
    panel: "Axes", x: np.ndarray, y: np.ndarray, color: str, smooth: float, label: str = "", marker: str | None = None
) -> None:
    if smooth:
        panel.plot(x, y, color=color, alpha=0.22, linewidth=0.9)
    panel.plot(x, smoothed(y, smooth), color=color, label=label, marker=marker, markersize=4)


def _title(panel: "Axes", metric: str) -> None:
    kind, _, name = metric.rpartition("/")
    panel.set_title(f"{TITLES.get(name, name.replace('_', ' '))}{f' ({kind})' if kind else ''}", color=INK)
    panel.yaxis.set_major_formatter(_compact)


def _label_x(panel: "Axes", x: str, longest: float = 0.0) -> float:
    """Label the x axis and return what to divide its values by: times are shown in the unit that suits the longest."""
    panel.margins(x=0.02)
    if x == "time":
        for unit, seconds in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0)):
            if longest > 2 * seconds or seconds == 1:
                panel.set_xlabel(f"{AXES[x]} ({unit})")
                return seconds
    panel.set_xlabel(AXES[x])
    panel.xaxis.set_major_formatter("{x:.3g}" if x == "flops" else _compact)
    return 1.0


def _trim_start(panel: "Axes", metric: str) -> None:
    """Let the top of a loss panel be set by what comes after the first few percent of it."""
    if not metric.endswith("loss"):
        return
    lines = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in panel.lines]
    last = max((x.max() for x, _ in lines if len(x)), default=0.0)
    later = [y[(x > WARMUP_SHARE * last) & np.isfinite(y)] for x, y in lines]
    values = np.concatenate(later) if later else np.array([])
    if len(values) > 1 and values.max() > values.min():
        margin = 0.06 * (values.max() - values.min())
        panel.set_ylim(values.min() - margin, values.max() + margin)


def _compact(value: float, _: Any = None) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _labels(runs: Sequence[Path]) -> list[str]:
    """Run names, or ids where two runs share their name."""
    ids = [Path(folder).absolute().name for folder in runs]
    names = [re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", run_id) for run_id in ids]
    return names if len(set(names)) == len(names) else ids


@contextmanager
def drawn(output: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure in the house style, written to `output` when the block ends. Raises RunError for an unknown suffix."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        # A Figure without pyplot renders with Agg, needs no display, and leaves the caller's backend alone.
        figure = Figure(figsize=(width, height))
        yield figure
        formats = figure.canvas.get_supported_filetypes()
        if output.suffix[1:].lower() not in formats:
            raise RunError(f"{output}: cannot write a '{output.suffix}' file. Known: {', '.join(sorted(formats))}.")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
