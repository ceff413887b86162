"""Pretraining: from text to a language model."""

import logging
import operator
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from treadle.config import Config, key_error, to_dict, to_yaml
from treadle.data.config import DataConfig
from treadle.data.dataset import check_vocabulary
from treadle.data.loader import Loader, Sequential
from treadle.data.ngram import ngram_bits_per_byte
from treadle.data.prepare import Prepared, prepare
from treadle.evaluate.perplexity import EvaluateConfig, evaluate_perplexity
from treadle.inference.load import CHECKPOINTS, FINAL, TOKENIZER
from treadle.inference.text import SampleConfig
from treadle.nn.flops import parameter_count
from treadle.nn.store import save_model
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.tracking.plot import plot_training
from treadle.tracking.read import load_metrics, load_samples
from treadle.tracking.run import Run
from treadle.tracking.sinks import TrackingConfig
from treadle.train import callbacks
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig, TrainingConfig
from treadle.train.loop import Loop
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, OptimizerConfig
from treadle.train.resume import check_resume
from treadle.train.schedules import CosineConfig, ScheduleConfig
from treadle.train.setup import build_model, build_state, find_device, with_vocabulary
from treadle.train.state import TrainState

logger = logging.getLogger(__name__)


class RecipeConfig(Config):
    """A pretraining run."""

    recipe: Literal["pretrain"] = "pretrain"
    imports: tuple[str, ...] = Field((), description="Python files or modules with blocks of your own")
    name: str = Field("pretrain", description="name of the run")
    root: Path = Field(Path("runs"), description="folder that holds the run folders")
    folder: Path | None = Field(None, description="exactly this run folder; null: root/name-date")
    seed: NonNegativeInt = Field(0, description="of weights and data order")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    model: TransformerConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig | None = Field(EvaluateConfig(), description="held-out text; null: none")
    sample: SampleConfig | None = Field(SampleConfig(), description="text sampled on the way; null: none")
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _rows_fit_the_model(self) -> "RecipeConfig":
        length, longest = self.training.sequence_length, self.model.max_length
        if length > longest:
            raise key_error("training.sequence_length", f"{length} is more than model.max_length={longest}; raise that")
        further = self.model.multi_token
        if further is not None and length <= further.depth:
            message = f"{length} must be more than model.multi_token.depth={further.depth}; raise it, or lower that"
            raise key_error("training.sequence_length", message)
        return self


def main(config: RecipeConfig, *, resume: Path | None = None, console: Console | None = None) -> Path:
    """Train; returns the run folder. resume: the folder of a run to go on with, from its latest checkpoint."""
    console = console or Console()
    device = find_device(config.device)
    sinks = config.tracking.build()
    data = prepare(config.data)
    loader = Loader(
        data.train,
        data.weights,
        sequence_length=config.training.sequence_length,
        batch_size=config.training.batch_size,
        seed=config.seed,
        isolate_documents=config.data.isolate_documents,
    )
    spec = with_vocabulary(config.model, data.tokenizer.vocab_size)
    assert spec.vocab_size is not None  # with_vocabulary has set it
    check_vocabulary((*data.train, *data.validation.values()), spec.vocab_size)
    saved, yaml = to_dict(config), to_yaml(config)
    if resume is None:
        run, step = Run.create(config.root, config.name, saved, yaml, sinks, folder=config.folder), None
    else:
        checkpoints = Checkpointer(resume / CHECKPOINTS, config.checkpoint)
        step = check_resume(checkpoints, loader, spec, config.training.steps)
        run = Run.resume(resume, sinks, saved)
    with run:
        model = build_model(spec, config.training, seed=config.seed, device=device)
        state = build_state(model, config.optimizer, config.training)
        checkpointer = Checkpointer(run.folder / CHECKPOINTS, config.checkpoint)
        if step is not None:
            checkpointer.load(state, step)
        elif resume is not None:
            logger.warning("no complete checkpoint in %s: starting from step 0", checkpointer.folder)
        run.accept_config(yaml)  # only now: a refused resume leaves the run's own configuration
        data.tokenizer.save(run.folder / TOKENIZER)
        console.print(
            f"run {run.id}: {parameter_count(model):,} parameters on {device.type}, "
            f"{sum(dataset.tokens for dataset in data.train):,} training tokens",
            highlight=False,
            soft_wrap=True,
        )
        train(config, run, state, loader, data, checkpointer, console)
        if state.step == config.training.steps:
            finish(config, run, model, data, console)
        else:
            run.finish("interrupted")
            stopped = f"stopped at step {state.step}; go on with: treadle train --resume {run.folder}"
            console.print(stopped, soft_wrap=True, highlight=False)
    return run.folder


def train(
    config: RecipeConfig,
    run: Run,
    state: TrainState,
    loader: Loader,
    data: Prepared,
    checkpointer: Checkpointer,
    console: Console,
) -> None:
    """Run the loop from the state's step to the configured one, or to an interruption."""
    training, model = config.training, state.model
    spec = to_dict(model.config)
    positions = training.batch_size * training.sequence_length
    metrics = callbacks.Metrics(run, training.log_every, positions, attended_length(config, data))
    progress = callbacks.ShowProgress(console, metrics)
    around: list[callbacks.Callback] = [
        metrics,
        progress,
        callbacks.SaveCheckpoints(checkpointer, lambda step: {"model": spec, "data": loader.state(step)}),
    ]
    if config.evaluate is not None:
        around.append(callbacks.Every(config.evaluate.every, partial(log_evaluation, config, run, model, data)))
    if config.sample is not None:
        around.append(callbacks.Every(config.sample.every, partial(log_sample, config.sample, run, model, data)))
    loss = partial(cross_entropy, z_loss=training.z_loss, attention=training.attention)
    loop = Loop(state, training, config.schedule, loss, around, rescue=run.folder)
    batches = loader.iterate_micro(training.rows, state.step, training.steps)
    try:
        loop.run(batches)
    finally:
        progress.close()
        batches.close()
        checkpointer.finish()


def attended_length(config: RecipeConfig, data: Prepared) -> float:
    """Tokens of the row or document that a token stands in, on average: what the FLOPs of attention follow from."""
    length = config.training.sequence_length
    if not config.data.isolate_documents:
        return length
    lengths = [dataset.attended_length(length) for dataset in data.train]
    return sum(map(operator.mul, lengths, data.weights)) / sum(data.weights)


def log_evaluation(config: RecipeConfig, run: Run, model: Transformer, data: Prepared, step: int) -> None:
    for name, dataset in data.validation.items():
        held_out = Sequential(
            dataset,
            sequence_length=config.training.sequence_length,
            batch_size=(config.evaluate and config.evaluate.batch_size) or config.training.rows,
            isolate_documents=config.data.isolate_documents,
        )
        tokenizer = data.tokenizer
        text_bytes = held_out.predicted_bytes(tokenizer.token_bytes(), tokenizer.token_bytes(opening=True))
        result = evaluate_perplexity(model, held_out, text_bytes, attention=config.training.attention)
        run.log(step, result.metrics(), kind=evaluation_kind(data, name))


def log_sample(sample: SampleConfig, run: Run, model: Transformer, data: Prepared, step: int) -> None:
    run.sample(step, sample.prompt, sample.draw(model, data.tokenizer, seed=step))


def evaluation_kind(data: Prepared, name: str) -> str:
    return "evaluate" if len(data.validation) == 1 else f"evaluate/{name}"


def finish(config: RecipeConfig, run: Run, model: Transformer, data: Prepared, console: Console) -> None:
    """Keep the final weights by themselves, and show what came out."""
    folder = save_model(model, run.folder / FINAL)
    data.tokenizer.save(folder / TOKENIZER)
    plot = plot_training(run.folder, run.folder / "training.png")
    console.rule(f"run {run.id}")
    if config.evaluate is not None:
        summarise_evaluation(config.evaluate, run, data, console)
    if config.sample is not None:
        sample = load_samples(run.folder)[-1]
        console.print(Panel(Text(sample["prompt"] + sample["text"]), title="sample", border_style="dim"))
    more = f"weights {folder}\nplot    {plot}\nmore    treadle generate {run.folder}"
    console.print(more, highlight=False, soft_wrap=True)


def summarise_evaluation(config: EvaluateConfig, run: Run, data: Prepared, console: Console) -> None:
    """The final score on each held-out dataset, beside the n-gram model's."""
    baselines = ngram_bits_per_byte(data, config.ngram) if config.ngram else {}
    for name in data.validation:
        prefix = "" if len(data.validation) == 1 else f"{name}_"
        bits = load_metrics(run.folder, kind=evaluation_kind(data, name))["bits_per_byte"][-1]
        run.summary(**{f"{prefix}bits_per_byte": bits})
        console.print(f"held-out {name}: [bold]{bits:.3f} bits per byte[/]", highlight=False)
        if name in baselines:
            run.summary(**{f"{prefix}ngram_bits_per_byte": baselines[name]})
            told = f"  a byte {config.ngram}-gram model: {baselines[name]:.3f} bits per byte"
            console.print(told, highlight=False)
