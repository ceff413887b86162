"""`treadle convert`: Hugging Face checkpoints in and out, and what is in one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from treadle.cli._options import RUNS, Imports, Root, dtype_named
from treadle.config import yaml_io
from treadle.config.load import import_all
from treadle.config.schema import plain
from treadle.errors import CheckpointError

app = typer.Typer(no_args_is_help=True, help="Exchange checkpoints with Hugging Face.")

Folder = Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.", show_default=False)]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32. Default: as they are.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]


@app.command()
def hf_import(
    source: Folder,
    target: Annotated[Path, typer.Argument(help="Folder to write: model.yaml, weights, tokenizer/.")],
    dtype: Dtype = None,
    eos: Annotated[
        str | None, typer.Option("--eos", help="Token that ends a document. Default: what the tokenizer declares.")
    ] = None,
    imports: Imports = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a Hugging Face checkpoint into a model folder, for train, generate and the rest."""
    from treadle.data.tokenizer import NO_TOKENIZER, declare_eos
    from treadle.families import checkpoint
    from treadle.nn.flops import parameter_count
    from treadle.nn.store import build_meta

    _prepare(imports, source, target, checkpoint.CONFIG_FILE, overwrite)
    options: dict[str, Any] = {
        "dtype": dtype_named(dtype),
        "imports": imports or [],
        "progress": _progress("importing"),
    }
    spec = checkpoint.convert(source, target, **options)
    typer.echo(f"{target}: {parameter_count(build_meta(spec)):,} parameters")
    tokenizer = target / "tokenizer"
    if eos is not None:
        declare_eos(tokenizer, eos)
    if not (tokenizer / "tokenizer.json").is_file():
        typer.echo(NO_TOKENIZER.format(folder=tokenizer))


@app.command()
def hf_export(
    source: Annotated[str, typer.Argument(help="Run (folder, id, latest) or model folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write, for transformers' from_pretrained.")],
    family: Annotated[str | None, typer.Option("--family", help="model_type. Default: the first that fits.")] = None,
    dtype: Dtype = None,
    imports: Imports = None,
    overwrite: Overwrite = False,
    root: Root = RUNS,
) -> None:
    """Write a model as a Hugging Face checkpoint with its tokenizer."""
    from treadle import api
    from treadle.families import checkpoint
    from treadle.inference.load import import_blocks, model_folder, tokenizer_folder
    from treadle.nn.store import SPEC_FILE

    folder = api.find_model(source, root)
    _prepare(imports, folder, target, SPEC_FILE, overwrite)
    tokenizer = tokenizer_folder(folder)
    options: dict[str, Any] = {"family": family, "dtype": dtype_named(dtype), "progress": _progress("exporting")}
    options["tokenizer"] = tokenizer if tokenizer.is_dir() else None
    import_blocks(folder)
    if (whole := model_folder(folder)) is not None:
        written = checkpoint.save_folder(whole, target, **options)
    elif checkpoint.is_published(folder):
        raise CheckpointError(f"{folder}: is a Hugging Face checkpoint already; to write it in another way, import it")
    else:  # a run that has not come to its end
        import torch

        model, _ = api.load(folder, device="cpu", dtype=torch.float32)
        written = checkpoint.save(model, target, **options)
    typer.echo(f"{target}: {written.architecture}")


@app.command()
def inspect(source: Folder, imports: Imports = None) -> None:
    """Print the spec of a Hugging Face checkpoint and where its tensors go, without loading it."""
    from treadle.families import checkpoint
    from treadle.nn.flops import active_parameter_count, parameter_count

    import_all(imports or [], "--import")
    family, spec, model, reader, parts = checkpoint.open_published(source)
    console = Console(highlight=False, soft_wrap=True)
    total, active = parameter_count(model), active_parameter_count(model)
    more = "" if active == total else f", {active:,} active"
    console.print(f"family [bold]{family.model_type}[/] ({family.architecture}), {total:,} parameters{more}")
    console.print(yaml_io.dump(plain(spec)), markup=False, end="")
    dtypes = sorted({str(reader.dtype(p.source)).removeprefix("torch.") for ps in parts.values() for p in ps})
    console.print(f"\n{len({p.source for ps in parts.values() for p in ps})} tensors fit, in {', '.join(dtypes)}")


def _prepare(imports: list[str] | None, source: Path, target: Path, foreign: str, overwrite: bool) -> None:
    """foreign: the file of the other kind of checkpoint, which is never to be written over."""
    import_all(imports or [], "--import")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; choose another folder")
    if target.resolve() == source.resolve() or (target / foreign).is_file():
        raise CheckpointError(
            f"{target}: holds a checkpoint of the other kind, which would be lost; choose another folder"
        )
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"{target}: is not empty; choose another folder, or pass --overwrite")


def _progress(what: str) -> Any:
    console = Console(stderr=True)

    def tracked(items: Iterable[Any], total: int) -> Iterable[Any]:
        if not console.is_terminal:
            return items  # where rich would leave an empty line
        return track(items, what, total=total, console=console, transient=True)

    return tracked
