"""What the experiments of this folder share: runs trained side by side, numbers kept as JSON, a table for the docs.

Each figure has two steps: measure (train, evaluate, write `<name>.json`) and draw (read that file alone). `--redraw`
takes the second only.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from treadle import recipes
from treadle.config import to_yaml
from treadle.errors import RunError
from treadle.parallel.mesh import find_device
from treadle.tracking.environment import git_state
from treadle.tracking.read import CONFIG_FILE, STATUS_FILE, load_status
from treadle.train.hardware import device_name

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
TREADLE = "from treadle.cli import main; main()"


@dataclass(frozen=True)
class Variant:
    """One run: a recipe of this folder, and what is changed in it."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


def train_all(variants: Sequence[Variant], root: Path, jobs: int) -> dict[str, Path]:
    """The run folders by name. A run that is finished stays, one that was stopped goes on, `jobs` train at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        folders = pool.map(lambda variant: train(variant, root / variant.name), variants)
    return dict(zip((variant.name for variant in variants), folders, strict=True))


def train(variant: Variant, folder: Path) -> Path:
    """Raises RunError if the folder holds a run of another configuration, or if training fails."""
    overrides = [f"folder={folder}", *variant.overrides]
    if (folder / STATUS_FILE).exists():
        config = to_yaml(recipes.load(HERE / variant.recipe, overrides))
        if (folder / CONFIG_FILE).read_text() != config:
            raise RunError(f"{folder}: holds a run of another configuration; delete it, or choose another --runs")
        if load_status(folder)["state"] == "finished":
            say(variant.name, "is finished already")
            return folder
        arguments = ["--resume", str(folder)]
    else:
        arguments = [str(HERE / variant.recipe), *overrides]
    began = time.perf_counter()
    command = [sys.executable, "-c", TREADLE, "train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(variant.name, line.rstrip())
    if process.returncode or load_status(folder)["state"] != "finished":
        raise RunError(f"{variant.name}: training did not come to its end, see {folder / 'log.txt'}")
    say(variant.name, f"took {time.perf_counter() - began:.0f} s")
    return folder


_printing = threading.Lock()


def say(name: str, text: str) -> None:
    with _printing:  # lines of runs side by side stay whole
        print(f"[{name}] {text}", flush=True)


def arguments(description: str | None, runs: str, jobs: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where numbers and figure go (docs/figures; with --quick, --runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs") / runs, help="where the run folders go")
    parser.add_argument("--jobs", type=int, default=jobs, help="runs that train side by side")
    parser.add_argument("--quick", action="store_true", help="toy sizes, for a CPU: shows that it works, no result")
    parser.add_argument("--redraw", action="store_true", help="only draw, from the numbers that lie in --out")
    parser.add_argument("overrides", nargs="*", help="changes to every recipe, such as training.steps=3000")
    return parser


def carry_out(
    asked: argparse.Namespace,
    name: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    draw: Callable[[dict[str, Any], Path], Any],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Measure unless it is a redraw; draw `<name>.png`; and put the table in the page beside the folder, if any."""
    out = asked.out or (asked.runs if asked.quick else REPOSITORY / "docs/figures")
    numbers = out / f"{name}.json"
    if not asked.redraw:
        began = time.perf_counter()
        result = {**measure(asked), **machine(), "seconds": round(time.perf_counter() - began)}
        numbers.parent.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(result, indent=1) + "\n")
    if not numbers.is_file():
        raise RunError(f"{numbers}: no numbers to draw; run without --redraw first")
    result = json.loads(numbers.read_text())
    draw(result, out / f"{name}.png")
    rows = f"{table(result)}\n\n{origin(result)}"
    page = out.parent / "experiments.md"
    if page.is_file() and not result["quick"]:
        page.write_text(filled(page.read_text(), name, rows))
    print(f"{rows}\n\n{numbers}\n{out / name}.png", flush=True)


def machine() -> dict[str, Any]:
    state = git_state(REPOSITORY) or {}
    return {"device": device_name(find_device("auto")), "torch": torch.__version__, "revision": state.get("revision")}


def origin(result: dict[str, Any]) -> str:
    revision = f", revision {result['revision'][:7]}" if result["revision"] else ""  # a copy may be no repository
    return f"{result['device']}, torch {result['torch']}{revision}, {result['seconds'] / 60:.1f} minutes in all."


def filled(page: str, name: str, text: str) -> str:
    """The page with `text` between `<!-- name -->` and `<!-- /name -->`."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise RunError(f"the page has no {start.strip()} ... {end} to put the table in")
    return f"{before}{start}{text}\n{end}{after}"


def markdown(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(map(str, head))]
    lines += [["---"] * len(lines[0]), *(list(map(str, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
