"""`treadle config`: what a recipe resolves to, every key there is, what differs between two."""

import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle import config as configs
from treadle import recipes
from treadle.config.load import import_all
from treadle.config.show import ABSENT, Key
from treadle.config.words import quote
from treadle.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Show a resolved recipe, list every key, compare two runs.")


def complete_overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion of the keys in `key=value`, for a command whose argument `recipe` names the recipe file."""
    recipe = ctx.params.get("recipe")
    try:
        paths = [_override_path(key) for key in _keys(str(recipe))] if recipe else []
    except Exception:  # whatever is wrong with the recipe, a completion must not print into the user's line
        return []
    return [f"{path}=" for path in dict.fromkeys(paths) if path.startswith(incomplete)]


Recipe = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides: model.dim=512 '**.bias=true'.", autocompletion=complete_overrides
    ),
]
Preset = Annotated[str | None, typer.Option("--preset", help="Preset of the recipe. Default: the device's, if any.")]


@app.command()
def show(recipe: Recipe, overrides: Overrides = None, preset: Preset = None) -> None:
    """Print the resolved recipe as YAML, every default written out. It runs again identically."""
    typer.echo(configs.to_yaml(recipes.load(recipe, overrides or (), preset)), nl=False)


@app.command()
def keys(
    where: Annotated[
        str | None, typer.Argument(help="A recipe name, a recipe file, or the beginning of a key.", show_default=False)
    ] = None,
    grep: Annotated[str | None, typer.Option("--grep", help="Only rows that contain this text.")] = None,
) -> None:
    """List every key that a recipe may hold: type, default, meaning."""
    listed = _keys(where)
    if grep:
        listed = [key for key in listed if grep.lower() in " ".join(key).lower()]
    if not listed:
        raise ConfigError(f"no key matches '{grep or where}'; `treadle config keys` lists all")
    print_table(Key._fields, [tuple(key) for key in listed])


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Recipe file or run folder.", show_default=False)],
    b: Annotated[Path | None, typer.Argument(help="The other one; left out: A itself.", show_default=False)] = None,
    override: Annotated[list[str] | None, typer.Option("--override", "-o", help="key=value, applied to B.")] = None,
) -> None:
    """Show the keys in which two recipes or runs differ."""
    if b is None and not override:
        raise ConfigError("nothing to compare with: name a second recipe or run, or give --override key=value")
    rows = configs.diff(_load(a), _load(b or a, override or []))
    if not rows:
        typer.echo("no difference")
        return
    right = " ".join([str(b or a), *(override or [])])
    print_table(("key", str(a), right), [(key, show_value(x), show_value(y)) for key, x, y in rows])


def _load(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The full configuration of a recipe, or the one that a run has saved."""
    if path.is_dir():
        if overrides:
            raise ConfigError(f"{path}: a run is what it was; overrides go with {path / 'config.yaml'}")
        # As it was saved, not validated again: the schema may have moved on since.
        return configs.read_yaml(path / "config.yaml")
    return configs.to_dict(recipes.load(path, overrides or ()))


def _keys(where: str | None) -> list[Key]:
    """The keys of one recipe, by name or by file; else those of all recipes that begin with `where`."""
    if where in recipes.names():
        return configs.keys(recipes.schema(where))
    if where and where.endswith((".yaml", ".yml")):
        raw = configs.read_yaml(where)
        import_all(raw.get("imports", []), where)  # the user's own kinds are keys as well
        return configs.keys(recipes.schema_of(where, raw))
    everything = [key for name in recipes.names() for key in configs.keys(recipes.schema(name))]
    return [key for key in dict.fromkeys(everything) if _plain(key.key).startswith(_plain(where or ""))]


def _override_path(key: Key) -> str:
    """The key as an override writes it: every list item, whatever its kind."""
    return re.sub(r"\([^)]*\)", "", key.key).replace("[]", ".*").replace("{}", ".*")


def _plain(key: str) -> str:
    """The key without indices and kinds, so that `layers.0.mixer`, `layers[].mixer` and `layers.*.mixer` are one."""
    return re.sub(r"\([^)]*\)|\[\d*\]|\{\}|\.\d+|\.\*", "", key)


def show_value(value: Any) -> str:
    """A value of a difference, as a reader of YAML knows it."""
    return repr(value) if value is ABSENT else quote(value)


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """One row per line; on a terminal too narrow for that, each key on a line of its own. Keys are for copying."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (columns, *rows)]
    if sys.stdout.isatty() and max(map(len, lines)) > shutil.get_terminal_size().columns:
        lines = [f"{key}\n    {'   '.join(filter(None, rest))}" for key, *rest in rows]
    typer.echo("\n".join(lines))
