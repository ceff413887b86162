"""`treadle adapter`: what fine-tuning has left behind, merged, or exchanged with PEFT."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli._options import RUNS, Root

app = typer.Typer(no_args_is_help=True, help="Adapters: merge them, exchange them with PEFT.")

Source = Annotated[str, typer.Argument(help="Run (folder, id, latest) or adapter folder.", show_default=False)]
Base = Annotated[Path | None, typer.Option("--base", help="The weights, if they are elsewhere now.")]
Family = Annotated[str | None, typer.Option("--family", help="model_type. Default: the first that fits.")]


@app.command()
def merge(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder to write: model.yaml and weights.")],
    base: Base = None,
    root: Root = RUNS,
) -> None:
    """Write the model with what was learned in its weights, as a model folder."""
    from treadle import api
    from treadle.train.adapters import merge_adapter

    merge_adapter(api.find_model(source, root), target, base=base)
    typer.echo(f"{target}: to Hugging Face's format with treadle convert hf-export {target} FOLDER")


@app.command()
def export(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder to write, for PEFT's PeftModel.from_pretrained.")],
    base: Base = None,
    family: Family = None,
    root: Root = RUNS,
) -> None:
    """Write LoRA, DoRA or IA3 in PEFT's file format."""
    from treadle import api
    from treadle.finetune.peft import save_peft
    from treadle.train.adapters import load_adapter, load_base, read_facts

    folder = api.find_model(source, root)
    where = base or read_facts(folder).base
    save_peft(load_adapter(load_base(where), folder), target, family=family, base=str(where))
    typer.echo(f"{target}: adapter of {where}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder with adapter_config.json.", show_default=False)],
    base: Annotated[Path, typer.Argument(help="The weights that it belongs to.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    family: Family = None,
) -> None:
    """Take over an adapter in PEFT's file format."""
    from treadle.finetune.peft import load_peft
    from treadle.train.adapters import AdapterFacts, load_base, save_adapter
    from treadle.train.weights import fingerprint

    model = load_base(base)
    config = load_peft(model, source, family=family)
    facts = AdapterFacts(base=base.absolute(), fingerprint=fingerprint(base), finetune=config)
    typer.echo(f"{save_adapter(model, target, facts)}: {config.method} of {base}")
