"""`treadle train`: run a recipe, or go on with a run."""

from pathlib import Path
from typing import Annotated, Any

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
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes to start on this machine, one for each GPU. Or use torchrun.")
    ] = None,
) -> None:
    """Train a model from a recipe.

    Data is prepared first (and cached), then the model trains with live progress. The run folder holds the resolved
    configuration, metrics, samples, checkpoints and the final weights. Ctrl-C saves and stops; --resume goes on exactly
    there, with the same losses as if nothing had happened.

    Examples:

        treadle train recipes/quickstart.yaml

        treadle train recipes/quickstart.yaml training.steps=2000 optimizer.lr=1e-3

        treadle train --resume latest

        treadle train recipes/quickstart.yaml --nproc 8
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
    if nproc is None or nproc == 1:
        treadle.run(recipe, changes, preset=preset, resume=resume, root=root)
    else:
        _start(recipe, changes, preset, resume, root, nproc)


def _start(
    recipe: Path | None, changes: list[str], preset: str | None, resume: str | None, root: Path, processes: int
) -> None:
    """The same command in each process, once it is clear that the recipe fits so many."""
    import treadle
    from treadle import recipes
    from treadle.parallel.config import check_layout
    from treadle.parallel.launch import launch

    folder = None if resume is None else treadle.find_run(resume, root)
    config: Any = recipes.load(recipe or folder / "config.yaml", changes, preset)  # type: ignore[operator]
    training = config.training
    check_layout(
        config.parallel, processes, config.model, training.batch_size, training.sequence_length, rows=training.rows
    )
    arguments = ["train", *([str(recipe)] if recipe else []), *changes]
    if folder is not None:
        arguments += ["--resume", str(folder)]
    if preset is not None:
        arguments += ["--preset", preset]
    launch(arguments, processes)
