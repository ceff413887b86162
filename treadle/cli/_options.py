"""Arguments and options that several commands share, and the steps that they begin with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treadle.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from treadle.data.chat import ChatTemplate

Model = Annotated[str, typer.Argument(help="A run (folder, id, prefix, 'latest') or a model folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Imports = Annotated[
    list[str] | None, typer.Option("--import", help="Python file or module with blocks or families of your own.")
]
Root = Annotated[Path, typer.Option(help="Where runs are looked for.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0, help="0 is greedy.")]
Template = Annotated[Path | None, typer.Option("--chat-template", help="A Jinja file. Default: the tokenizer's own.")]
RUNS = Path("runs")


def chat_template(file: Path | None, folder: Path) -> "ChatTemplate | None":
    """The one in `file`, else the one of a model folder's tokenizer."""
    from treadle.data.chat import ChatTemplate
    from treadle.inference.load import tokenizer_folder

    return ChatTemplate.load(tokenizer_folder(folder)) if file is None else ChatTemplate(file.read_text())


def dtype_named(name: str | None) -> "torch.dtype | None":
    """By the name of `--dtype`, ours or PyTorch's; None for none, or auto. Raises ConfigError."""
    from treadle.train.setup import DTYPES

    dtypes: dict[str, torch.dtype | None] = {"auto": None}
    for key, dtype in DTYPES.items():
        dtypes |= {str(key): dtype, str(dtype).removeprefix("torch."): dtype}
    if name is not None and name not in dtypes:
        raise ConfigError(f"--dtype: '{name}'; expected {', '.join(dtypes)}")
    return dtypes[name or "auto"]
