"""`treadle convert`: Hugging Face checkpoints in and out, and what is in one."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

app = typer.Typer(no_args_is_help=True, help="Exchange checkpoints with Hugging Face.")

Folder = Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.", show_default=False)]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32. Default: as they are.")]
Imports = Annotated[
    list[str] | None, typer.Option("--import", help="Python file or module with families or blocks of your own.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]


@app.command()
def hf_import(
    source: Folder,
    target: Annotated[Path, typer.Argument(help="Folder to write: model.yaml, weights, tokenizer/.")],
    dtype: Dtype = None,
    imports: Imports = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a Hugging Face checkpoint into a model folder, for train, generate and the rest."""
    from treadle.families import checkpoint
    from treadle.nn.flops import parameter_count
    from treadle.nn.store import build_meta

    _prepare(imports, target, overwrite)
    spec = checkpoint.convert(source, target, dtype=_dtype(dtype), progress=_progress("importing"))
    typer.echo(f"{target}: {parameter_count(build_meta(spec)):,} parameters")
    if not (target / "tokenizer" / "tokenizer.json").is_file():
        typer.echo(
            "no tokenizer.json came with it; write one with transformers' AutoTokenizer.from_pretrained(...)"
            f".save_pretrained('{target / 'tokenizer'}')"
        )


@app.command()
def hf_export(
    source: Annotated[str, typer.Argument(help="Run (folder, id, latest) or model folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write, for transformers' from_pretrained.")],
    family: Annotated[str | None, typer.Option("--family", help="model_type. Default: the first that fits.")] = None,
    dtype: Dtype = None,
    imports: Imports = None,
    overwrite: Overwrite = False,
    root: Annotated[Path, typer.Option("--root", help="Folder that holds the runs.")] = Path("runs"),
) -> None:
    """Write a model as a Hugging Face checkpoint with its tokenizer."""
    from treadle import api
    from treadle.families import checkpoint
    from treadle.inference.load import stored_dtype

    _prepare(imports, target, overwrite)
    folder = Path(source) if Path(source).is_dir() else api.find_run(source, root)
    model, tokenizer = api.load(folder, device="cpu", dtype=_dtype(dtype) or stored_dtype(folder))
    written = checkpoint.save(model, target, family=family, progress=_progress("exporting"))
    tokenizer.save(target)
    typer.echo(f"{target}: {written.architecture}")


@app.command()
def inspect(source: Folder, imports: Imports = None) -> None:
    """Print the spec of a Hugging Face checkpoint and where its tensors go, without loading it."""
    from rich.console import Console

    from treadle.config import yaml_io
    from treadle.config.schema import plain
    from treadle.families import checkpoint
    from treadle.families.quantised import dequantised
    from treadle.families.tensors import match
    from treadle.nn.flops import active_parameter_count, parameter_count
    from treadle.nn.store import build_meta
    from treadle.nn.weights import WeightsReader

    _import(imports)
    family, spec = checkpoint.read_spec(source)
    model = build_meta(spec)
    console = Console(highlight=False, soft_wrap=True)
    total, active = parameter_count(model), active_parameter_count(model)
    more = "" if active == total else f", {active:,} active"
    console.print(f"family [bold]{family.model_type}[/] ({family.architecture}), {total:,} parameters{more}")
    console.print(yaml_io.dump(plain(spec)), markup=False, end="")
    reader = dequantised(WeightsReader(source), checkpoint.read_config(source))
    parts = match(family, model, reader)
    dtypes = sorted({str(reader.dtype(p.source)).removeprefix("torch.") for ps in parts.values() for p in ps})
    console.print(f"\n{len({p.source for ps in parts.values() for p in ps})} tensors fit, in {', '.join(dtypes)}")


def _prepare(imports: list[str] | None, target: Path, overwrite: bool) -> None:
    _import(imports)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"{target}: is not empty; choose another folder, or pass --overwrite")


def _import(imports: list[str] | None) -> None:
    from treadle.config.load import import_all

    import_all(imports or [], "--import")


def _dtype(name: str | None) -> "torch.dtype | None":
    if name is None:
        return None
    from treadle.train.setup import DTYPES

    dtypes: dict[str, torch.dtype] = {str(key): value for key, value in DTYPES.items()}
    if name not in dtypes:
        raise ConfigError(f"--dtype: '{name}'; expected {', '.join(dtypes)}")
    return dtypes[name]


def _progress(what: str) -> Any:
    from rich.progress import track

    def tracked(items: Iterable[Any], total: int) -> Iterable[Any]:
        return track(items, what, total=total, transient=True)

    return tracked
