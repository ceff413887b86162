"""A training run, opened, trained and closed in the same way whatever is trained on: the keys, the folder, the loop."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, model_validator
from rich.console import Console

from treadle.config import Config, diff, key_error, to_dict, to_yaml
from treadle.data.batches import Batches
from treadle.errors import CheckpointError
from treadle.finetune import FinetuneConfig, settle
from treadle.finetune import begin as begin_updates
from treadle.nn.flops import parameter_count
from treadle.nn.store import FINAL, build_meta
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.parallel.config import ParallelConfig, check_layout
from treadle.parallel.mesh import Mesh, World, find_device, open_mesh
from treadle.parallel.shards import save_whole
from treadle.tracking.follower import Follower
from treadle.tracking.run import Run
from treadle.tracking.sinks import Sink, TrackingConfig
from treadle.train import callbacks
from treadle.train.adapters import ADAPTER, AdapterFacts, merge_adapter, save_adapter
from treadle.train.checkpoint import CHECKPOINTS, Checkpointer
from treadle.train.config import CheckpointConfig, TrainingConfig
from treadle.train.loop import Loop
from treadle.train.losses import LossFunction
from treadle.train.optimizers import AdamWConfig, MuonConfig, OptimizerConfig
from treadle.train.resume import check_resume
from treadle.train.schedules import CosineConfig, ScheduleConfig
from treadle.train.setup import build_model, build_state
from treadle.train.state import TrainState
from treadle.train.weights import fingerprint, load_weights, spec_of

logger = logging.getLogger(__name__)


class SessionConfig(Config):
    """The keys that all training recipes share; each names itself in `recipe` and adds what it trains on."""

    recipe: str
    imports: tuple[str, ...] = Field((), description="Python files or modules with blocks of your own")
    name: str = Field(description="name of the run")
    root: Path = Field(Path("runs"), description="folder that holds the run folders")
    folder: Path | None = Field(None, description="exactly this run folder; null: root/name-date")
    seed: NonNegativeInt = Field(0, description="of weights and data order")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    weights: Path | None = Field(
        None, description="what the model starts from: a Hugging Face folder, a model folder or a run; null: the seed"
    )
    model: TransformerConfig = Field(description="the architecture; may be left out where `weights` has it")
    finetune: FinetuneConfig | None = Field(None, description="what is trained of the weights; null: all")
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _model_of_the_weights(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("model") is None and isinstance(data.get("weights"), str | Path):
            return {**data, "model": to_dict(spec_of(Path(data["weights"])))}
        return data

    @model_validator(mode="after")
    def _updates_have_weights(self) -> "SessionConfig":
        if self.finetune is None:
            return self
        if self.weights is None:
            raise key_error("weights", "not set, and `finetune` needs some; give a folder or a run")
        if self.finetune.lr_ratio != 1.0 and isinstance(self.optimizer, MuonConfig):
            raise key_error(
                "finetune.lr_ratio", f"{self.finetune.lr_ratio}, which muon does not know; use adamw or sgd"
            )
        return self

    @model_validator(mode="after")
    def _rows_fit_the_model(self) -> "SessionConfig":
        length, longest = self.training.sequence_length, self.model.max_length
        if length > longest:
            raise key_error("training.sequence_length", f"{length} is more than model.max_length={longest}; raise that")
        further = self.model.multi_token
        if further is not None and length <= further.depth:
            message = f"{length} must be more than model.multi_token.depth={further.depth}; raise it, or lower that"
            raise key_error("training.sequence_length", message)
        return self

    @model_validator(mode="after")
    def _scaler_fits_the_layout(self) -> "SessionConfig":
        if self.training.precision == "fp16" and self.parallel.pipeline > 1:
            message = "fp16, whose loss scale each stage of a pipeline would change by itself; use bf16"
            raise key_error("training.precision", message)
        return self


@dataclass(frozen=True)
class Session:
    """An open run. Made by `open_session`."""

    config: SessionConfig
    run: Run
    state: TrainState
    batches: Batches
    checkpointer: Checkpointer
    console: Console
    mesh: Mesh
    base: AdapterFacts | None = None  # of a run that leaves most weights as they are, which

    @property
    def model(self) -> Transformer:
        return self.state.model

    @property
    def rows(self) -> int:
        """Rows that go through this process's model at a time."""
        return min(self.config.training.rows, self.batches.batch_size // self.batches.world)

    def announce(self, data: str) -> None:
        """Say what begins; `data` is what it is trained on."""
        size, device = self.mesh.world.size, self.mesh.device.type
        where = device if size == 1 else f"{size} x {device}"
        told = f"run {self.run.id}: {parameter_count(build_meta(self.model.config)):,} parameters on {where}, {data}"
        self.console.print(told, highlight=False, soft_wrap=True)

    def train(self, loss: LossFunction, around: Sequence[callbacks.Callback], *, length: float) -> bool:
        """Run the loop from the state's step on. Whether it came to the end; otherwise the run is marked interrupted.

        around: callbacks after those for metrics, progress and checkpoints. length: tokens that attention spans, on
        average, for FLOPs.
        """
        training, spec = self.config.training, to_dict(self.model.config)
        base = {} if self.base is None else {"adapter": to_dict(self.base)}
        positions = training.batch_size * training.sequence_length
        metrics = callbacks.Metrics(self.run, training.log_every, positions, length)
        progress = callbacks.ShowProgress(self.console, metrics)
        save = callbacks.SaveCheckpoints(
            self.checkpointer, lambda step: {"model": spec, "data": self.batches.state(step), **base}
        )
        everything = [metrics, progress, save, *around]
        timeout = self.config.parallel.timeout
        loop = Loop(
            *(self.state, training, self.config.schedule, loss, everything),
            mesh=self.mesh,
            rescue=self.run.folder,
            timeout=timeout,
        )
        batches = self.batches.iterate_micro(training.rows, self.state.step, training.steps)
        try:
            loop.run(batches)
        finally:
            progress.close()
            batches.close()
            self.checkpointer.finish()
        if self.state.step == training.steps:
            return True
        self.run.finish("interrupted")
        stopped = f"stopped at step {self.state.step}; go on with: treadle train --resume {self.run.folder}"
        self.console.print(stopped, soft_wrap=True, highlight=False)
        return False

    def save_final(self) -> Path:
        """Keep what came out by itself: the weights, or what was learned beside them, and the two as one where that is
        asked for. Returns the folder. All processes call it."""
        final = self.run.folder / FINAL
        if self.base is None:
            return save_whole(self.model, final, self.mesh)
        folder = save_adapter(self.model, self.run.folder / ADAPTER, self.base, self.mesh)
        if not (self.base.finetune.merge and self.base.finetune.mergeable):
            return folder
        self.mesh.leaders(lambda: merge_adapter(folder, final))
        return final


def base_of(config: SessionConfig) -> AdapterFacts | None:
    """Which weights a run leaves as they are, if it does."""
    if config.finetune is None or config.finetune.method == "full" or config.weights is None:
        return None
    return AdapterFacts(
        base=config.weights.absolute(), fingerprint=fingerprint(config.weights), finetune=config.finetune
    )


def check_same_base(facts: dict[str, Any], base: AdapterFacts | None) -> None:
    """Raises CheckpointError where a checkpoint is of other weights, or of another way to fine-tune them."""
    before = facts.get("adapter")
    now = None if base is None else to_dict(base)
    changes = diff(*({k: v for k, v in (found or {}).items() if k != "base"} for found in (before, now)))
    if changes:
        shown = "; ".join(f"{key}: {old} -> {new}" for key, old, new in changes)
        raise CheckpointError(
            f"the checkpoint was made with other weights or another `finetune` ({shown}); restore them"
        )


@contextmanager
def open_processes(config: SessionConfig) -> Iterator[Mesh]:
    """The processes that share the run, each on its device. Raises ConfigError before any of them is waited for."""
    world = World.here()
    training = config.training
    layout = check_layout(
        config.parallel, world.size, config.model, training.batch_size, training.sequence_length, rows=training.rows
    )
    with open_mesh(layout, find_device(config.device, world), timeout=config.parallel.timeout) as mesh:
        yield mesh


@contextmanager
def open_session(
    config: SessionConfig,
    spec: TransformerConfig,
    batches: Batches,
    sinks: Sequence[Sink],
    *,
    mesh: Mesh,
    resume: Path | None,
    console: Console,
) -> Iterator[Session]:
    """The run with its model and state at the step to go on from; it ends as the block does.

    spec: `config.model` with its vocabulary. resume: the folder of a run to go on with, from its latest checkpoint.
    Raises CheckpointError or DataError for a run that cannot go on like this, before anything in it is changed.
    """
    saved, yaml, opened = to_dict(config), to_yaml(config), list[Run]()

    def begin() -> tuple[Path, int | None, AdapterFacts | None]:
        base = base_of(config)
        if resume is None:
            opened.append(Run.create(config.root, config.name, saved, yaml, sinks, folder=config.folder))
            return opened[0].folder, None, base
        checkpoints = Checkpointer(resume / CHECKPOINTS, config.checkpoint)
        step = check_resume(checkpoints, batches, spec, config.training.steps)
        if step is not None:
            check_same_base(checkpoints.facts(step), base)
        opened.append(Run.resume(resume, sinks, saved))
        return resume, step, base

    folder, step, base = mesh.leaders(begin)
    with opened[0] if opened else Follower(folder) as run:
        options: dict[str, Any] = {"mesh": mesh, "parallel": config.parallel, "finetune": config.finetune}
        model = build_model(spec, config.training, seed=config.seed, **options)
        if config.weights is not None and (step is None or base is not None):
            load_weights(model, config.weights)
        state = build_state(model, config.optimizer, config.training)
        checkpointer = Checkpointer(run.folder / CHECKPOINTS, config.checkpoint, mesh)
        if step is not None:
            checkpointer.load(state, step)
        else:
            begin_updates(model)
            if resume is not None:
                logger.warning("no complete checkpoint in %s: starting from step 0", checkpointer.folder)
        settle(model)
        run.accept_config(yaml)  # only now: a refused resume leaves the run's own configuration
        yield Session(config, run, state, batches, checkpointer, console, mesh, base)
