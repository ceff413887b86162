"""`treadle tokenizer`: learn a tokenizer, and see how it cuts text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from treadle.cli.data import Field, Separator, data_config, source_keys, tokenizer_keys

if TYPE_CHECKING:
    from treadle.data.tokenizer import Tokenizer

app = typer.Typer(no_args_is_help=True, help="Learn a tokenizer, and see how it cuts text.")

SAMPLE = 'def greet(name: str) -> str:\n    return f"Hello, {name}! It is 2026."  # ünïcödé 你好\n'


@app.command()
def train(
    inputs: Annotated[list[str], typer.Argument(help="Text files (.txt, .jsonl, .parquet, ...), or python_stdlib.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, as Hugging Face reads it.")],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, with bytes and special tokens.")] = 8192,
    max_bytes: Annotated[int, typer.Option(help="How much text to learn from, at most.")] = 256 << 20,
    field: Field = "text",
    separator: Separator = None,
) -> None:
    """Learn a byte-level BPE from text.

    Example:

        treadle tokenizer train python_stdlib --vocab-size 4096 --output tokenizer
    """
    from treadle.data.prepare import training_text

    console = Console()
    config = data_config(source_keys(inputs, field, separator), tokenizer_keys("train", vocab_size))
    assert config.tokenizer is not None
    with console.status(f"learning {vocab_size:,} tokens"):
        tokenizer = config.tokenizer.build(training_text(config.sources, 0, max_bytes))
    tokenizer.save(output)
    console.print(
        f"{output}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:16]}", highlight=False
    )


@app.command()
def inspect(
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="A tokenizer.json, or its folder.")],
    text: Annotated[str | None, typer.Argument(help="What to cut. Default: a line of code and some Unicode.")] = None,
) -> None:
    """Show a tokenizer's size, how it cuts a text, and how many bytes a token stands for there."""
    from treadle.data.tokenizer import Tokenizer

    console = Console(highlight=False)
    loaded = Tokenizer.load(tokenizer)
    shown = text if text is not None else SAMPLE
    ids = loaded.encode(shown)
    console.print(f"vocabulary   {loaded.vocab_size:,}")
    console.print(f"end of text  {loaded.eos} = {loaded.eos_id}")
    console.print(f"fingerprint  {loaded.fingerprint[:16]}")
    size = len(shown.encode())
    console.print(f"this text    {size} bytes, {len(ids)} tokens, {size / max(len(ids), 1):.2f} bytes/token\n")
    console.print(pieces(loaded, ids))


def pieces(tokenizer: "Tokenizer", ids: list[int]) -> Text:
    """The tokens side by side, in two colours; bytes that are no whole character show as \\x.."""
    shown = Text()
    for number, token in enumerate(ids):
        raw = tokenizer.token(token)
        style = "black on bright_cyan" if number % 2 else "black on bright_yellow"
        try:
            piece = raw.decode()
        except UnicodeDecodeError:
            piece = "".join(f"\\x{byte:02x}" for byte in raw)
        *lines, last = piece.split("\n")
        for line in lines:
            shown.append(f"{line}⏎", style).append("\n")
        shown.append(last, style)
    return shown
