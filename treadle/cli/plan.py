"""`treadle plan`: does it fit, and how fast will it be? Without a GPU, in seconds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from treadle import recipes
from treadle.cli.config import complete_overrides
from treadle.cli.model import model_of
from treadle.config import read_yaml, resolve, yaml_io
from treadle.errors import ConfigError

if TYPE_CHECKING:
    from treadle.memory.plan import Plan
    from treadle.memory.search import Found


def plan(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe (YAML), a model spec by itself; to serve: also a folder.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to the recipe: training.micro_batch_size=2 parallel.tensor=8",
            autocompletion=complete_overrides,
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices to run on.")] = 1,
    device: Annotated[str, typer.Option(help="h200, h100, a100, ..., here, or a YAML file of one.")] = "h200",
    search: Annotated[bool, typer.Option("--search", help="Try all layouts; show the ten fastest that fit.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Memory from a step of the real code on tensors without memory.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="With --search: write the best one's changes to this file, for include.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Plan `treadle serve`; overrides are the engine's: slots=512.")
    ] = False,
    length: Annotated[
        int | None, typer.Option(min=1, help="With --serve: tokens of a request. Default: the longest.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the devices of this machine, for --device here.")
    ] = False,
    preset: Annotated[str | None, typer.Option(help="A preset of the recipe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers for a program (bytes, seconds).")] = False,
) -> None:
    """Predict memory by category, the time of a step, tokens per second and MFU, before anything is launched.

    Exit code 1 where it does not fit; then the cheapest changes that would make it fit are shown.

    Examples:

        treadle plan recipes/models/llama-3-8b.yaml --gpus 8 --device h100 training.batch_size=8

        treadle plan recipes/models/llama-3.1-405b.yaml --gpus 1024 --search training.batch_size=2048

        treadle plan --serve models/Qwen3-0.6B --device h200 --length 2048

        treadle plan --calibrate
    """
    from treadle.memory import advice
    from treadle.memory.predict import plan_of, setting_of

    if write is not None and not search:
        raise typer.BadParameter("--write goes with --search")
    if calibrate:
        _calibrate(as_json)
        return
    if recipe is None:
        raise typer.BadParameter("a recipe or a model spec is missing")
    if length is not None and not serve:
        raise typer.BadParameter("--length goes with --serve")
    if serve:
        _serve(recipe, list(overrides or []), device, length, as_json)
        return
    config = _load(recipe, list(overrides or []), preset, gpus, device)
    console = Console()
    if not console.is_terminal:
        console.width = 200
    if search:
        _search(config, gpus, device, write, as_json, console)
        return
    setting = setting_of(config, gpus, device)
    found = plan_of(setting)
    if dry_run:
        found = _dry(found, config, gpus)
    cheapest = advice.cheapest(setting) if found.verdict == "does not fit" else []
    if as_json:
        changes = [{"changes": each.changes, **each.plan.summary()} for each in cheapest]
        typer.echo(json.dumps(found.to_dict() | {"cheapest": changes}, indent=2))
    else:
        _print(found, setting.device, cheapest, console)
    if found.verdict == "does not fit":
        raise typer.Exit(1)


def _calibrate(as_json: bool) -> None:
    from treadle.config import to_dict, yaml_io
    from treadle.memory.calibrate import calibrate
    from treadle.memory.devices import calibrated
    from treadle.parallel.mesh import find_device

    found = to_dict(calibrate(find_device("auto")))
    path = calibrated(found["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml_io.dump(found))
    typer.echo(json.dumps(found, indent=2) if as_json else f"{yaml_io.dump(found)}\nwritten to {path}: --device here")


def _serve(path: Path, overrides: list[str], device: str, length: int | None, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from treadle.cli.model import spec_of
    from treadle.config import resolve
    from treadle.inference.engine import EngineConfig
    from treadle.inference.plan import plan_serving
    from treadle.memory.devices import find_device
    from treadle.memory.plan import GIB

    known = find_device(device)
    found = plan_serving(spec_of(path, []), known, resolve(EngineConfig, {}, overrides), length=length)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    table = Table("GiB", known.name, title="memory")
    for name in ("weights", "cache", "workspace", "overhead"):
        table.add_row(name, f"{getattr(found, name) / GIB:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{found.cache_tokens:,} tokens of cache: {found.requests} requests of {found.length:,} tokens at a time\n"
        f"tokens/s at most: {found.alone:,.0f} for one request, {found.together:,.0f} for {found.requests}, "
        f"{found.prompts:,.0f} of prompts",
        highlight=False,
        soft_wrap=True,
    )


def _load(path: Path, overrides: list[str], preset: str | None, gpus: int, device: str) -> Any:
    """A recipe with its vocabulary, for this device; of a model spec one that trains it at its full length."""
    from treadle.memory.predict import Planned

    raw = read_yaml(path)
    if "recipe" not in raw and "layers" in raw:
        rows = {"steps": 1, "sequence_length": raw.get("max_length", 1), "batch_size": gpus}
        return resolve(Planned, {"model": raw, "training": rows}, overrides)
    if preset is None and device != "cpu" and "cuda" in raw.get("presets", {}):
        preset = "cuda"  # as `treadle train` takes it, where there is a GPU
    config: Any = recipes.load(path, overrides, preset)
    return config.model_copy(update={"model": model_of(config)})


def _dry(plan: "Plan", config: Any, gpus: int) -> "Plan":
    """The same with the memory that a dry run finds; what is not PyTorch's stays as it is."""
    from dataclasses import replace

    from treadle.memory.dry_run import dry_run

    ranks = zip(dry_run(config, gpus), plan.footprints, strict=True)
    return replace(plan, footprints=tuple(replace(rank.footprint, overhead=closed.overhead) for rank, closed in ranks))


def _print(plan: "Plan", device: Any, cheapest: list["Found"], console: Console) -> None:
    from treadle.memory.plan import GIB

    names = [name for name, _ in plan.footprints[0] if any(dict(each)[name] for each in plan.footprints)]
    memory = Table("GiB at the peak", *(f"rank {n}" for n in range(len(plan.footprints))), title="memory of a process")
    for name in names:
        memory.add_row(name, *(f"{dict(each)[name] / GIB:.2f}" for each in plan.footprints))
    memory.add_section()
    memory.add_row("total", *(f"{each.total / GIB:.2f}" for each in plan.footprints))
    time = Table("ms", "waited for", "beside", title="time of a step")
    for name, seconds in (("compute", plan.time.compute), ("memory", plan.time.memory)):
        time.add_row(name, f"{1e3 * seconds:.1f}", "")
    for name in plan.time.communication | plan.time.hidden:
        sent = (plan.time.communication.get(name, 0.0), plan.time.hidden.get(name, 0.0))
        time.add_row(name if name == "launches" else f"send: {name}", *(f"{1e3 * seconds:.1f}" for seconds in sent))
    time.add_row("bubble", f"{1e3 * plan.time.bubble:.1f}", "")
    time.add_section()
    time.add_row("total", f"{1e3 * plan.time.total:.1f}", "")
    console.print(memory)
    console.print(time)
    console.print(
        f"{plan.verdict}: {plan.peak / GIB:.1f} of {plan.memory / GIB:.1f} GiB on {device.name}; "
        f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%} of {device.peak_tflops:g} TFLOP/s",
        highlight=False,
    )
    if cheapest:
        console.print("It would fit with:", highlight=False)
        for found in cheapest:
            cost = found.plan.time.total / plan.time.total - 1
            told = f"{found.plan.peak / GIB:.1f} GiB, a step takes {cost:+.0%}"
            console.print(f"  {' '.join(found.overrides())}  ({told})", highlight=False, soft_wrap=True)
    elif plan.verdict == "does not fit":
        console.print("Neither one change nor two would make it fit; try --search, or more devices.", highlight=False)


def _search(config: Any, gpus: int, device: str, write: Path | None, as_json: bool, console: Console) -> None:
    from treadle.memory.plan import GIB
    from treadle.memory.predict import open_setting
    from treadle.memory.search import search as searched

    setting = open_setting(config, gpus, device)
    found = searched(setting)
    if not found:
        raise ConfigError(
            f"no layout of {gpus} x {setting.device.name} holds this model at training.batch_size="
            f"{setting.training.batch_size}; take more devices, or a batch size with more divisors"
        )
    if as_json:
        typer.echo(json.dumps([{"changes": each.changes, **each.plan.to_dict()} for each in found], indent=2))
    else:
        table = Table("tokens/s", "MFU", "GiB", "changes")
        for each in found:
            numbers = f"{each.plan.tokens_per_second:,.0f}", f"{each.plan.mfu:.1%}", f"{each.plan.peak / GIB:.1f}"
            table.add_row(*numbers, " ".join(each.overrides()))
        console.print(table)
        console.print("the first of them:", *found[0].overrides(), highlight=False, soft_wrap=True)
    if write is not None:
        write.write_text(yaml_io.dump(found[0].changes))
