"""`treadle generate`: text from a trained model."""

import sys
from typing import Annotated, Any

import typer

from treadle.cli._options import RUNS, Device, Imports, Model, Root, Temperature


def generate(
    model: Model = "latest",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; '-' reads standard input.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of each sample.")] = 256,
    temperature: Temperature = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep the likeliest tokens of this probability.")
    ] = 0.95,
    samples: Annotated[int, typer.Option("--samples", min=1, help="How many continuations.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Device = "auto",
    imports: Imports = None,
    root: Root = RUNS,
) -> None:
    """Sample text from a trained model, as it is made.

    Examples:

        treadle generate latest --prompt "def read_lines(path):"

        treadle generate runs/quickstart-20260101-120000 -n 64 --samples 4 -t 1.0
    """
    import treadle

    text = sys.stdin.read() if prompt == "-" else prompt
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    options |= {"top_k": top_k, "top_p": top_p}
    loaded, tokenizer = treadle.load(model, device=device, root=root, imports=imports or [])
    if samples == 1:
        typer.echo(text, nl=False)
        for piece in treadle.stream(loaded, tokenizer, text, **options):
            typer.echo(piece, nl=False)
        typer.echo()
        return
    for number, sample in enumerate(treadle.generate(loaded, tokenizer, text, samples=samples, **options), 1):
        typer.secho(f"--- sample {number}", dim=True)
        typer.echo(text + sample)
