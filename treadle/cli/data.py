"""`treadle data`: text to tokens, and what is in them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from treadle.config import resolve
from treadle.errors import ConfigError

if TYPE_CHECKING:
    from treadle.data.config import DataConfig
    from treadle.data.shards import ShardDataset

app = typer.Typer(no_args_is_help=True, help="Turn text into tokens; look at tokens and check them.")

Field = Annotated[str, typer.Option(help="The key (jsonl) or column (parquet) that holds the text.")]
Separator = Annotated[str | None, typer.Option(help="What stands between the documents of a text file.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A prepared folder, or one folder of shards.")]


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Text files, or python_stdlib; or a recipe (YAML), then key=value changes to it."),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="A tokenizer.json or its folder, 'bytes', or 'train' to learn one from the text.")
    ] = "train",
    vocab_size: Annotated[int, typer.Option(help="Size of a tokenizer that is learned.")] = 8192,
    held_out: Annotated[float, typer.Option(help="Fraction of the documents kept for validation.")] = 0.01,
    field: Field = "text",
    separator: Separator = None,
    workers: Annotated[int | None, typer.Option(help="Processes that tokenise. Default: one per usable core.")] = None,
    cache: Annotated[Path, typer.Option(help="Where prepared data is kept.")] = Path("cache"),
) -> None:
    """Tokenise text, or the data of a recipe, into the cache, where training finds it.

    What is already there is not made again. Ctrl-C leaves nothing behind that could be taken for whole.

    Examples:

        treadle data prepare 'corpus/*.jsonl.zst' --vocab-size 32768

        treadle data prepare recipes/quickstart.yaml data.held_out=0.05
    """
    from treadle.data.prepare import prepare as prepare_data

    if inputs[0].endswith((".yaml", ".yml")):
        config = recipe_data(inputs[0], inputs[1:])
    else:
        source, chosen = source_keys(inputs, field, separator), tokenizer_keys(tokenizer, vocab_size)
        config = data_config(source, chosen, held_out=held_out, workers=workers, cache=str(cache))
    for folder in prepare_data(config).folders:
        inspect(folder, documents=0)


@app.command()
def inspect(
    folder: Folder,
    documents: Annotated[int, typer.Option("--documents", "-n", min=0, help="How many documents to show.")] = 2,
) -> None:
    """Show what a folder of tokens holds, and the beginning of its first documents."""
    console = Console()
    columns = ("split", "documents", "tokens", "bytes", "bytes/token", "shards", "dtype")
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    datasets = opened(folder)
    for name, dataset in datasets.items():
        manifest = dataset.manifest
        counts = (f"{n:,}" for n in (manifest.documents, manifest.tokens, manifest.bytes))
        ratio = f"{manifest.bytes / max(manifest.tokens, 1):.2f}"
        table.add_row(name, *counts, ratio, str(len(manifest.shards)), manifest.dtype)
    console.print(f"[bold]{folder}[/]", highlight=False)
    console.print(table)
    first = next(iter(datasets.values()))
    console.print(f"vocabulary {first.vocab_size:,}, tokenizer {first.manifest.tokenizer[:16]}", highlight=False)
    for number in range(min(documents, first.documents)):
        console.rule(f"document {number}, {len(first.document(number)):,} tokens")
        console.print(Text(beginning(folder, first, number)))


@app.command()
def verify(folder: Folder) -> None:
    """Read every token: compare the files with their checksums, and the ids with the vocabulary."""
    console = Console()
    for name, dataset in opened(folder).items():
        with console.status(f"{name}: {dataset.tokens:,} tokens"):
            dataset.verify()
        console.print(f"[green]{name}[/]: {dataset.tokens:,} tokens in {len(dataset.parts)} shards are as written")


def recipe_data(path: str, overrides: list[str]) -> "DataConfig":
    """The `data` section of a recipe."""
    from treadle import recipes
    from treadle.data.config import DataConfig

    data = getattr(recipes.load(path, overrides), "data", None)
    if not isinstance(data, DataConfig):
        raise ConfigError(f"{path}: this recipe has no `data` section to prepare")
    return data


def data_config(source: dict[str, Any], tokenizer: dict[str, Any], **keys: Any) -> "DataConfig":
    """The section that the options of a command stand for. Raises ConfigError."""
    from treadle.data.config import DataConfig

    return resolve(DataConfig, {"sources": [source], "tokenizer": tokenizer, **keys})


def tokenizer_keys(name: str, vocab_size: int) -> dict[str, Any]:
    """'train', 'bytes', or a path."""
    known: dict[str, dict[str, Any]] = {
        "train": {"kind": "train", "vocab_size": vocab_size},
        "bytes": {"kind": "bytes"},
    }
    return known.get(name, {"kind": "file", "path": name})


def source_keys(inputs: list[str], field: str, separator: str | None) -> dict[str, Any]:
    """The source that paths on the command line mean, by their ending. Raises ConfigError for a mixture of kinds."""
    if inputs == ["python_stdlib"]:
        return {"kind": "python_stdlib"}
    endings = {"jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "parquet": (".parquet",)}
    kinds = {next((kind for kind, ends in endings.items() if path.endswith(ends)), "text") for path in inputs}
    if len(kinds) > 1:
        raise ConfigError(
            f"inputs are of several kinds ({', '.join(sorted(kinds))}); list them as `sources` in a recipe"
        )
    (kind,) = kinds
    key, value = {"jsonl": ("field", field), "parquet": ("column", field), "text": ("separator", separator)}[kind]
    return {"kind": kind, "paths": inputs, key: value}


def opened(folder: Path) -> dict[str, "ShardDataset"]:
    """The datasets of a prepared folder, by split."""
    from treadle.data.shards import MANIFEST, TRAIN, VALIDATION, ShardDataset

    splits = [name for name in (TRAIN, VALIDATION) if (folder / name / MANIFEST).is_file()]
    return {name: ShardDataset(folder / name) for name in splits} or {folder.name: ShardDataset(folder)}


def beginning(folder: Path, dataset: "ShardDataset", number: int) -> str:
    """The first 200 tokens of a document: as text where the tokenizer is at hand, else as ids."""
    from treadle.data.tokenizer import Tokenizer

    tokens = dataset.document(number)[:200].tolist()
    for place in (folder, folder.parent):
        if (place / "tokenizer").is_dir():
            return Tokenizer.load(place / "tokenizer").decode(tokens)
    return " ".join(map(str, tokens))
