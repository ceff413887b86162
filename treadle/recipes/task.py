"""Training on a task whose samples are made as they are needed, scored by the answers to held-out ones."""

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator
from rich.console import Console

from treadle.config import key_error, key_errors
from treadle.data.tasks import TaskBatches, TaskConfig
from treadle.evaluate.accuracy import AccuracyConfig, evaluate_accuracy
from treadle.inference.load import FINAL
from treadle.nn.store import save_model
from treadle.nn.transformer import Transformer
from treadle.tracking.plot import plot_training
from treadle.tracking.read import load_metrics
from treadle.tracking.run import Run
from treadle.train.callbacks import Every
from treadle.train.losses import cross_entropy
from treadle.train.session import SessionConfig, open_session
from treadle.train.setup import find_device, with_vocabulary


class RecipeConfig(SessionConfig):
    """A run on a task."""

    recipe: Literal["task"] = "task"
    name: str = Field("task", description="name of the run")
    task: SerializeAsAny[TaskConfig]
    evaluate: AccuracyConfig = AccuracyConfig()

    @model_validator(mode="after")
    def _task_fits(self) -> "RecipeConfig":
        problems = list(self.task.problems(self.training.sequence_length))
        if problems:
            raise key_errors([(f"task.{key}", message) for key, message in problems])
        size, needed = self.model.vocab_size, self.task.vocab_size
        if size is not None and size < needed:
            raise key_error(
                "model.vocab_size", f"{size} is less than task.vocab_size={needed}; raise it, or leave it out"
            )
        return self


def main(config: RecipeConfig, *, resume: Path | None = None, console: Console | None = None) -> Path:
    """Train; returns the run folder. resume: the folder of a run to go on with, from its latest checkpoint."""
    console = console or Console()
    device = find_device(config.device)
    sinks = config.tracking.build()
    batches = samples_of(config, config.task, config.training.batch_size)
    spec = with_vocabulary(config.model, config.task.vocab_size)
    with open_session(config, spec, batches, sinks, device=device, resume=resume, console=console) as session:
        run, model, training = session.run, session.model, config.training
        session.announce(f"task {config.task.kind}")  # type: ignore[attr-defined]
        loss = partial(cross_entropy, z_loss=training.z_loss, attention=training.attention)
        around = [Every(config.evaluate.every, partial(log_accuracy, config, run, model))]
        if session.train(loss, around, length=training.sequence_length):
            finish(config, run, model, console)
    return run.folder


def samples_of(config: RecipeConfig, task: TaskConfig, batch_size: int, held_out: bool = False) -> TaskBatches:
    length = config.training.sequence_length
    return TaskBatches(task, sequence_length=length, batch_size=batch_size, seed=config.seed, held_out=held_out)


def log_accuracy(config: RecipeConfig, run: Run, model: Transformer, step: int) -> None:
    rows, samples = config.training.rows, config.evaluate.samples
    for name, part in config.task.parts().items():
        held_out = samples_of(config, part, rows, held_out=True)
        batches = (held_out.samples(first, min(first + rows, samples)) for first in range(0, samples, rows))
        result = evaluate_accuracy(model, batches, attention=config.training.attention)
        run.log(step, result.metrics(), kind=evaluation_kind(config, name))


def evaluation_kind(config: RecipeConfig, part: str) -> str:
    return "evaluate" if len(config.task.parts()) == 1 else f"evaluate/{part}"


def finish(config: RecipeConfig, run: Run, model: Transformer, console: Console) -> None:
    """Keep the final weights by themselves, and say what came out."""
    folder = save_model(model, run.folder / FINAL)
    plot = plot_training(run.folder, run.folder / "training.png")
    for part in config.task.parts():
        accuracy = load_metrics(run.folder, kind=evaluation_kind(config, part))["accuracy"][-1]
        run.summary(**{f"{part}_accuracy": accuracy})
        console.print(f"held-out accuracy, {part.replace('_', ' ')}: {accuracy:.2%}", highlight=False)
    console.print(f"weights {folder}\nplot    {plot}", highlight=False, soft_wrap=True)
