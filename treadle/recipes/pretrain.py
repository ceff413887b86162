"""Pretraining: from text to a language model."""

import logging
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from treadle.config import Config, diff, to_dict, to_yaml
from treadle.data.config import DataConfig
from treadle.data.loader import Loader, Sequential
from treadle.data.ngram import ngram_bits_per_byte
from treadle.data.prepare import Prepared, prepare
from treadle.errors import CheckpointError
from treadle.evaluate.perplexity import Perplexity, evaluate_perplexity
from treadle.inference.generate import stream
from treadle.inference.load import CHECKPOINTS, FINAL, TOKENIZER
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
from treadle.train.schedules import CosineConfig, ScheduleConfig
from treadle.train.setup import build_model, build_state, find_device, with_vocabulary
from treadle.train.state import TrainState

logger = logging.getLogger(__name__)


class EvaluateConfig(Config):
    """Held-out text, measured in bits per byte."""

    every: PositiveInt | None = Field(None, description="steps between evaluations; null: only at the end")
    batch_size: PositiveInt = Field(8, description="rows at a time")
    ngram: NonNegativeInt = Field(0, description="order of a byte n-gram model to compare with at the end; 0: none")


class SampleConfig(Config):
    """Text sampled from the model while it trains."""

    every: PositiveInt | None = Field(None, description="steps between samples; null: only at the end")
    prompt: str = Field("", description="what the sample continues; empty: the start of a document")
    max_new_tokens: PositiveInt = Field(128, description="length of the sample")
    temperature: float = Field(0.8, ge=0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="keep the likeliest tokens that make up this probability")


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
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()
    tracking: TrackingConfig = TrackingConfig()


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
    saved, yaml = to_dict(config), to_yaml(config)
    if resume is None:
        run = Run.create(config.root, config.name, saved, yaml, sinks, folder=config.folder)
    else:
        run = Run.resume(resume, sinks, saved, yaml)
    with run:
        model = build_model(spec, config.training, seed=config.seed, device=device)
        state = build_state(model, config.optimizer, config.training)
        data.tokenizer.save(run.folder / TOKENIZER)
        checkpointer = Checkpointer(run.folder / CHECKPOINTS, config.checkpoint)
        if resume is not None:
            restore(state, checkpointer, loader, spec, config.training.steps)
        console.print(
            f"run {run.id}: {parameter_count(model):,} parameters on {device.type}, "
            f"{sum(dataset.tokens for dataset in data.train):,} training tokens",
            highlight=False,
        )
        train(config, run, state, loader, data, checkpointer, console)
        if state.step == config.training.steps:
            finish(config, run, model, data, console)
        else:
            run.finish("interrupted")
            console.print(f"stopped at step {state.step}; go on with: treadle train --resume {run.folder}")
    return run.folder


def restore(state: TrainState, checkpointer: Checkpointer, loader: Loader, spec: TransformerConfig, end: int) -> None:
    """Load the latest checkpoint, after checking that model and data are the ones it was made with.

    end: the run's number of steps, which the checkpoint must not be beyond.
    """
    steps = checkpointer.steps()
    if not steps:
        logger.warning("no complete checkpoint in %s: starting from step 0", checkpointer.folder)
        return
    facts = checkpointer.facts(steps[-1])
    if facts["model"] != to_dict(spec):
        changes = "; ".join(f"model.{key}: {old} -> {new}" for key, old, new in diff(facts["model"], to_dict(spec)))
        raise CheckpointError(
            f"{checkpointer.path(steps[-1])} holds another architecture ({changes}); restore the configuration of that "
            f"run, or start a new one"
        )
    if loader.resume(facts["data"]) != facts["step"]:
        raise CheckpointError(
            f"training.batch_size: {loader.batch_size}, but {checkpointer.path(steps[-1])} was made with batches of "
            f"{facts['data']['batch_size']}, and the step counts them; restore that, or start a new run"
        )
    if facts["step"] > end:
        raise CheckpointError(f"training.steps: {end}, but the run has a checkpoint of step {facts['step']}; raise it")
    checkpointer.load(state, steps[-1])


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
    metrics = callbacks.Metrics(run, training.log_every, positions, mean_length(config, data))
    progress = callbacks.ShowProgress(console, metrics)
    evaluate = partial(log_evaluation, config, run, model, data)
    loop = Loop(
        state,
        training,
        config.schedule,
        partial(cross_entropy, z_loss=training.z_loss, attention=training.attention),
        [
            metrics,
            progress,
            callbacks.SaveCheckpoints(checkpointer, lambda step: {"model": spec, "data": loader.state(step)}),
            callbacks.Every(config.evaluate.every, evaluate),
            callbacks.Every(config.sample.every, partial(log_sample, config, run, model, data)),
        ],
        rescue=run.folder,
    )
    rows = training.micro_batch_size or training.batch_size
    batches = loader.iterate_micro(rows, state.step, training.steps)
    try:
        loop.run(batches)
    finally:
        progress.close()
        batches.close()
        checkpointer.finish()


def mean_length(config: RecipeConfig, data: Prepared) -> float:
    """Tokens that attention spans on average, for the FLOPs count: documents or rows, whichever is shorter."""
    tokens, documents = (sum(getattr(d, what) for d in data.train) for what in ("tokens", "documents"))
    isolated = config.data.isolate_documents
    return min(config.training.sequence_length, tokens / documents if isolated else float("inf"))


def log_evaluation(config: RecipeConfig, run: Run, model: Transformer, data: Prepared, step: int) -> None:
    for name, result in evaluate_held_out(config, model, data).items():
        run.log(step, result.metrics(), kind=evaluation_kind(data, name))


def evaluation_kind(data: Prepared, name: str) -> str:
    return "evaluate" if len(data.validation) == 1 else f"evaluate/{name}"


def evaluate_held_out(config: RecipeConfig, model: Transformer, data: Prepared) -> dict[str, Perplexity]:
    """Perplexity on each held-out dataset, by name."""
    results = {}
    for name, dataset in data.validation.items():
        held_out = Sequential(
            dataset,
            sequence_length=config.training.sequence_length,
            batch_size=config.evaluate.batch_size,
            isolate_documents=config.data.isolate_documents,
        )
        text_bytes = held_out.predicted_bytes(data.tokenizer.token_bytes())
        results[name] = evaluate_perplexity(model, held_out, text_bytes, attention=config.training.attention)
    return results


def log_sample(config: RecipeConfig, run: Run, model: Transformer, data: Prepared, step: int) -> None:
    sample, tokenizer = config.sample, data.tokenizer
    prompt = tokenizer.encode(sample.prompt) or [tokenizer.eos_id]
    tokens: list[int] = []
    for (token,) in stream(
        model,
        prompt,
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_p=sample.top_p,
        seed=step,
    ):
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
    run.sample(step, sample.prompt, tokenizer.decode(tokens))


def finish(config: RecipeConfig, run: Run, model: Transformer, data: Prepared, console: Console) -> None:
    """Keep the final weights by themselves, and show what came out."""
    folder = save_model(model, run.folder / FINAL)
    data.tokenizer.save(folder / TOKENIZER)
    plot = plot_training(run.folder, run.folder / "training.png")
    console.rule(f"run {run.id}")
    for name in data.validation:
        bits = load_metrics(run.folder, kind=evaluation_kind(data, name))["bits_per_byte"][-1]
        run.summary(**{"bits_per_byte" if len(data.validation) == 1 else f"{name}_bits_per_byte": bits})
        console.print(f"held-out {name}: [bold]{bits:.3f} bits per byte[/]", highlight=False)
        if config.evaluate.ngram:
            baseline = ngram_bits_per_byte(data, name, config.evaluate.ngram)
            console.print(f"  a byte {config.evaluate.ngram}-gram model: {baseline:.3f} bits per byte", highlight=False)
            run.summary(ngram_bits_per_byte=baseline)
    sample = load_samples(run.folder)[-1]
    console.print(Panel(Text(sample["prompt"] + sample["text"]), title="sample", border_style="dim"))
    console.print(f"weights {folder}\nplot    {plot}\nmore    treadle generate {run.folder}", highlight=False)
