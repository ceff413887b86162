"""`treadle model`: what an architecture is made of and what it costs, without building it in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from treadle import config as configs
from treadle import recipes
from treadle.cli._options import Imports
from treadle.cli.config import print_table, show_value
from treadle.config.load import import_all
from treadle.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from treadle.nn.transformer import Transformer, TransformerConfig

app = typer.Typer(no_args_is_help=True, help="Show what a model is made of and what it costs; compare two.")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as for the file they go with.")
]
Length = Annotated[int | None, typer.Option("--length", help="Sequence length for FLOPs. Default: max_length.")]


@app.command()
def show(
    spec: Annotated[Path, typer.Argument(help="Recipe, model spec, or folder of a run or model.", show_default=False)],
    overrides: Overrides = None,
    length: Length = None,
    imports: Imports = None,
) -> None:
    """Print the modules with shapes, roles, parameters and FLOPs per token; equal layers are shown once."""
    from treadle.nn import flops

    import_all(imports or [], "--import")
    model = _build(spec_of(spec, overrides or []))
    length = length or model.config.max_length
    console = Console()
    if not console.is_terminal:
        console.width = 400  # a file has no edge to wrap at
    console.print(_tree(model, length))
    legend = f"Per token: forward FLOPs at a length of {length:,} (causal), bytes kept in the cache in bf16."
    if flops.state_elements(model):
        legend += " Per row: numbers kept in the state."
    console.print(legend, highlight=False)
    if model.multi_token is not None:
        console.print("Only training runs multi_token: the model's own FLOPs and cache leave it out.", highlight=False)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Recipe, model spec, or folder of a run or model.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The other one.", show_default=False)],
    length: Length = None,
    imports: Imports = None,
) -> None:
    """Show in which keys and in which costs two models differ."""
    import_all(imports or [], "--import")
    left, right = (_build(spec_of(path, [])) for path in (a, b))
    costs = [_costs(model, length or model.config.max_length) for model in (left, right)]
    rows = [(name, costs[0][name], costs[1][name]) for name in costs[0] if costs[0][name] != costs[1][name]]
    keys = [(key, show_value(x), show_value(y)) for key, x, y in configs.diff(left.config, right.config)]
    if not keys:
        typer.echo("no difference")
        return
    print_table(("", str(a), str(b)), [*keys, *rows])


def spec_of(path: Path, overrides: list[str]) -> "TransformerConfig":
    """The model section of a recipe, a spec by itself, or the model of a run or Hugging Face folder."""
    from treadle.families import checkpoint
    from treadle.nn.transformer import TransformerConfig

    if path.is_dir():
        inside = [path / name for name in ("model.yaml", "final/model.yaml", "config.yaml") if (path / name).is_file()]
        if not inside and checkpoint.is_published(path):
            return configs.resolve(TransformerConfig, configs.to_dict(checkpoint.read_spec(path)[1]), overrides)
        if not inside:
            raise ConfigError(f"{path}: holds no model.yaml, final/model.yaml, config.yaml or config.json")
        path = inside[0]
    if "model" not in configs.read_yaml(path):
        return configs.resolve(TransformerConfig, path, overrides)
    return model_of(recipes.load(path, overrides))


def model_of(recipe: Any) -> "TransformerConfig":
    """The model of a recipe, with a vocabulary where the size of the tokenizer is known beforehand."""
    from treadle.train.setup import with_vocabulary

    size = getattr(getattr(getattr(recipe, "data", None), "tokenizer", None), "vocab_size", None)
    config: TransformerConfig = recipe.model
    return config if size is None or config.vocab_size is not None else with_vocabulary(config, size)


def _build(config: "TransformerConfig") -> "Transformer":
    from treadle.nn.store import build_meta

    if config.vocab_size is None:
        raise ConfigError("model.vocab_size: not set, and the tokenizer's size is not known here; override it")
    return build_meta(config)


def _costs(model: "nn.Module", length: int) -> dict[str, str]:
    from treadle.nn import flops

    total, active = flops.parameter_count(model), flops.active_parameter_count(model)
    return {
        "parameters": f"{total:,}",
        "active": f"{active:,}" if active != total else "",
        "FLOPs": _short(flops.forward_flops(model, length)),
        "cache bytes": f"{2 * flops.cache_elements(model):,}",
        "state": f"{flops.state_elements(model):,}",
    }


def _tree(model: "Transformer", length: int) -> Tree:
    from treadle.nn.roles import parameter_roles

    roles: dict[str, str] = dict(parameter_roles(model))
    root = Tree(Text.assemble(("model", "bold"), f"  dim {model.config.dim}", _facts(model, length)))
    for name, module in model.named_children():
        if name != "layers":
            _add(root, name, name, module, roles, length)
            continue
        for label, index in _folded(model.config):
            _add(root, label, f"layers.{index}", model.layers[str(index)], roles, length)
    return root


def _folded(config: "TransformerConfig") -> Iterator[tuple[str, int]]:
    """('layers 0-4, 6-10 (10 equal)', 0): a name for each set of equal layers, and the first of them."""
    layers = config.expand()
    left = list(range(len(layers)))
    while left:
        same = [index for index in left if layers[index] == layers[left[0]]]
        ends = [i for i in same if i + 1 not in same]
        begins = [i for i in same if i - 1 not in same]
        ranges = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(begins, ends, strict=True))
        many = f" ({len(same)} equal, each)" if len(same) > 1 else ""
        yield f"layer{'s' if len(same) > 1 else ''} {ranges}{many}", same[0]
        left = [index for index in left if index not in same]


def _add(tree: Tree, label: str, path: str, module: "nn.Module", roles: dict[str, str], length: int) -> None:
    """A module with what it costs; below it its children, or beside it the shapes of its own parameters."""
    own = [(name, parameter) for name, parameter in module.named_parameters(recurse=False)]
    text = Text.assemble((label, "bold"), "  ", (type(module).__name__, "cyan"))
    for name, parameter in own:
        shape = " × ".join(str(size) for size in parameter.shape)
        title = "" if name == "weight" else f"{name} "
        # A tied weight is listed under its first name alone.
        text.append(f"  {title}[{shape}] {roles.get(f'{path}.{name}', 'shared')}")
    text.append(_facts(module, length))
    branch = tree.add(text)
    for name, child in module.named_children():
        if next(child.parameters(), None) is not None:
            _add(branch, name, f"{path}.{name}", child, roles, length)


def _facts(module: "nn.Module", length: int) -> str:
    return "".join(f"   {value} {name}" for name, value in _costs(module, length).items() if value not in ("", "0"))


def _short(value: float) -> str:
    """1.23 G; plain below a thousand."""
    for unit in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"
