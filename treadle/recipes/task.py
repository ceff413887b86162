"""Training on a task whose samples are made as they are needed, scored by the answers to held-out ones."""

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator
from rich.console import Console

from treadle.config import key_error, key_errors
from treadle.data.tasks import TaskBatches, TaskConfig
from treadle.evaluate.accuracy import AccuracyConfig, evaluate_accuracy, shared_out
from treadle.inference.load import FINAL
from treadle.parallel.shards import save_whole
from treadle.tracking.plot import plot_training
from treadle.tracking.read import load_metrics
from treadle.train.callbacks import Every
from treadle.train.losses import cross_entropy
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

    def batches(self, *, held_out: bool, batch_size: int, rank: int = 0, world: int = 1) -> TaskBatches:
        return TaskBatches(
            self.task,
            sequence_length=self.training.sequence_length,
            batch_size=batch_size,
            seed=self.seed,
            held_out=held_out,
            rank=rank,
            world=world,
        )


def main(config: RecipeConfig, *, resume: Path | None = None, console: Console | None = None) -> Path:
    """Train; returns the run folder. resume: the folder of a run to go on with, from its latest checkpoint."""
    training = config.training
    with open_processes(config) as mesh:
        console = console or Console(quiet=not mesh.leads)
        sinks = config.tracking.build() if mesh.leads else []
        share = {"rank": mesh.data_rank, "world": mesh.data_size}
        batches = config.batches(held_out=False, batch_size=training.batch_size, **share)
        spec = with_vocabulary(config.model, config.task.vocab_size)
        with open_session(config, spec, batches, sinks, mesh=mesh, resume=resume, console=console) as session:
            session.announce(f"task {config.task.kind}")  # type: ignore[attr-defined]
            loss = partial(cross_entropy, z_loss=training.z_loss, attention=training.attention)
            around = [Every(config.evaluate.every, partial(log_accuracy, config, session))]
            if session.train(loss, around, length=training.sequence_length):
                finish(session)
            return session.run.folder


def log_accuracy(config: RecipeConfig, session: Session, step: int) -> None:
    held_out = config.batches(held_out=True, batch_size=session.rows)
    batches = shared_out(held_out, config.evaluate.samples, session.rows, session.mesh)
    result = evaluate_accuracy(session.model, batches, attention=config.training.attention, mesh=session.mesh)
    session.run.log(step, result.metrics(), kind="evaluate")


def finish(session: Session) -> None:
    """Keep the final weights by themselves, and say what came out."""
    run = session.run
    folder = save_whole(session.model, run.folder / FINAL, session.mesh)
    if not session.mesh.leads:
        return
    plot = plot_training(run.folder, run.folder / "training.png")
    accuracy = load_metrics(run.folder, kind="evaluate")["accuracy"][-1]
    run.summary(accuracy=accuracy)
    told = f"held-out accuracy: {accuracy:.2%}\nweights {folder}\nplot    {plot}"
    session.console.print(told, highlight=False, soft_wrap=True)
