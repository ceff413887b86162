"""Training on a task whose samples are made as they are needed, scored by the answers to held-out ones."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, model_validator
from rich.console import Console

from treadle.config import key_error, key_errors
from treadle.data.tasks import TaskBatches, TaskConfig
from treadle.errors import ConfigError
from treadle.evaluate.accuracy import AccuracyConfig, evaluate_accuracy, shared_out
from treadle.kernels.linear_cross_entropy import IGNORED
from treadle.memory.tracker import TrackMemory, setting_of_run
from treadle.tracking.plot import plot_training
from treadle.tracking.read import load_metrics
from treadle.train.callbacks import Every
from treadle.train.losses import training_loss
from treadle.train.session import Session, SessionConfig, open_processes, open_session
from treadle.train.setup import with_vocabulary


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
    training = config.training
    check_answers(config)
    with open_processes(config) as mesh:
        console = console or Console(quiet=not mesh.leads)
        sinks = config.tracking.build() if mesh.leads else []
        share = {"rank": mesh.data_rank, "world": mesh.data_size}
        batches = samples_of(config, config.task, training.batch_size, **share)
        spec = with_vocabulary(config.model, config.task.vocab_size)
        with open_session(config, spec, batches, sinks, mesh=mesh, resume=resume, console=console) as session:
            session.announce(f"task {config.task.kind}")  # type: ignore[attr-defined]
            loss = training_loss(training)
            score = Every(config.evaluate.every, partial(log_accuracy, config, session))
            around = [TrackMemory(session.run, partial(setting_of_run, config, session.model, session.mesh)), score]
            if session.train(loss, around, length=training.sequence_length):
                finish(config, session)
            return session.run.folder


def samples_of(config: RecipeConfig, task: TaskConfig, batch_size: int, **options: Any) -> TaskBatches:
    """Rows of a task, of this run's length and seed. options: `held_out`, `rank` and `world` of TaskBatches."""
    length = config.training.sequence_length
    return TaskBatches(task, sequence_length=length, batch_size=batch_size, seed=config.seed, **options)


def check_answers(config: RecipeConfig) -> None:
    """Raises ConfigError, before anything is trained, for a task of which a part asks nothing."""
    samples = config.evaluate.samples
    for name, part in config.task.parts().items():
        held_out = samples_of(config, part, 1, held_out=True)
        if not any(held_out.samples(n, min(n + 64, samples)).valid_tokens for n in range(0, samples, 64)):
            whose = "" if name == "all" else f" of {name.replace('_', ' ')}"
            raise ConfigError(
                f"task: none of the {samples} held-out rows{whose} has a target, so there is nothing to score; "
                f"the task's `rows` must set some to another value than {IGNORED}"
            )


def log_accuracy(config: RecipeConfig, session: Session, step: int) -> None:
    for name, part in config.task.parts().items():
        held_out = samples_of(config, part, session.rows, held_out=True)
        batches = shared_out(held_out, config.evaluate.samples, session.rows, session.mesh)
        result = evaluate_accuracy(session.model, batches, attention=config.training.attention, mesh=session.mesh)
        session.run.log(step, result.metrics(), kind=evaluation_kind(config, name))


def evaluation_kind(config: RecipeConfig, part: str) -> str:
    return "evaluate" if len(config.task.parts()) == 1 else f"evaluate/{part}"


def finish(config: RecipeConfig, session: Session) -> None:
    """Keep the final weights by themselves, and say what came out."""
    run = session.run
    folder = session.save_final()
    if not session.mesh.leads:
        return
    plot = plot_training(run.folder, run.folder / "training.png")
    for part in config.task.parts():
        accuracy = load_metrics(run.folder, kind=evaluation_kind(config, part))["accuracy"][-1]
        run.summary(**{f"{part}_accuracy": accuracy})
        session.console.print(f"held-out accuracy, {part.replace('_', ' ')}: {accuracy:.2%}", highlight=False)
    session.console.print(f"weights {folder}\nplot    {plot}", highlight=False, soft_wrap=True)
