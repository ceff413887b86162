"""`treadle train`: run a recipe, or go on with a run."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.config import complete_overrides


def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML). Not needed with --resume.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to the recipe: optimizer.lr=3e-4 'model.layers.*.mixer.window=1024'",
            autocompletion=complete_overrides,
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run: its folder, id, a prefix of it, or 'latest'.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A preset of the recipe. Default: the one named after the device.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Where --resume looks for runs.")] = Path("runs"),
) -> None:
    """Train a model from a recipe.

    Data is prepared first (and cached), then the model trains with live progress. The run folder holds the resolved
    configuration, metrics, samples, checkpoints and the final weights. Ctrl-C saves and stops; --resume goes on exactly
    there, with the same losses as if nothing had happened.

    Examples:

        treadle train recipes/quickstart.yaml

        treadle train recipes/quickstart.yaml training.steps=2000 optimizer.lr=1e-3

        treadle train --resume latest
    """
    import treadle

    changes = list(overrides or [])
    if resume is not None and recipe is not None:
        if "=" not in str(recipe):
            raise typer.BadParameter(f"'{recipe}': --resume takes the run's own recipe; leave it out")
        changes.insert(0, str(recipe))  # with --resume every argument is an override
        recipe = None
    if (recipe is None) == (resume is None):
        raise typer.BadParameter("give a recipe, or --resume RUN")
    treadle.run(recipe, changes, preset=preset, resume=resume, root=root)
