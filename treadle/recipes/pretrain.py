"""Pretraining: from text to a language model."""

import operator
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from treadle.data.config import DataConfig
from treadle.data.dataset import check_vocabulary
from treadle.data.loader import Loader, Sequential
from treadle.data.ngram import ngram_bits_per_byte
from treadle.data.prepare import Prepared, prepare
from treadle.evaluate.perplexity import EvaluateConfig, evaluate_perplexity
from treadle.inference.load import TOKENIZER
from treadle.inference.text import SampleConfig
from treadle.memory.tracker import TrackMemory, setting_of_run
from treadle.tracking.plot import plot_training
from treadle.tracking.read import load_metrics, load_samples
from treadle.tracking.run import Run
from treadle.train.callbacks import Callback, Every
from treadle.train.losses import training_loss
from treadle.train.session import Session, SessionConfig, open_processes, open_session
from treadle.train.setup import with_vocabulary


class RecipeConfig(SessionConfig):
    """A pretraining run."""

    recipe: Literal["pretrain"] = "pretrain"
    name: str = Field("pretrain", description="name of the run")
    data: DataConfig
    evaluate: EvaluateConfig | None = Field(EvaluateConfig(), description="held-out text; null: none")
    sample: SampleConfig | None = Field(SampleConfig(), description="text sampled on the way; null: none")


def main(config: RecipeConfig, *, resume: Path | None = None, console: Console | None = None) -> Path:
    """Train; returns the run folder. resume: the folder of a run to go on with, from its latest checkpoint."""
    with open_processes(config) as mesh:
        console = console or Console(quiet=not mesh.leads)
        sinks = config.tracking.build() if mesh.leads else []
        with mesh.in_turn():
            data = prepare(config.data, progress=mesh.leads)
        loader = Loader(
            data.train,
            data.weights,
            sequence_length=config.training.sequence_length,
            batch_size=config.training.batch_size,
            seed=config.seed,
            rank=mesh.data_rank,
            world=mesh.data_size,
            isolate_documents=config.data.isolate_documents,
        )
        spec = with_vocabulary(config.model, data.tokenizer.vocab_size)
        assert spec.vocab_size is not None  # with_vocabulary has set it
        check_vocabulary((*data.train, *data.validation.values()), spec.vocab_size)
        with open_session(config, spec, loader, sinks, mesh=mesh, resume=resume, console=console) as session:
            if mesh.leads:
                data.tokenizer.save(session.run.folder / TOKENIZER)
            session.announce(f"{sum(dataset.tokens for dataset in data.train):,} training tokens")
            loss = training_loss(config.training)
            around = evaluations(config, session, data)
            if session.train(loss, around, length=attended_length(config, data)):
                finish(config, session, data)
            return session.run.folder


def evaluations(config: RecipeConfig, session: Session, data: Prepared) -> list[Callback]:
    """What is looked at on the way."""
    around: list[Callback] = [TrackMemory(session.run, partial(setting_of_run, config, session.model, session.mesh))]
    if config.evaluate is not None:
        around.append(Every(config.evaluate.every, partial(log_evaluation, config, session, data)))
    if config.sample is not None:
        around.append(Every(config.sample.every, partial(log_sample, config.sample, session, data)))
    return around


def attended_length(config: RecipeConfig, data: Prepared) -> float:
    """Tokens of the row or document that a token stands in, on average: what the FLOPs of attention follow from."""
    length = config.training.sequence_length
    if not config.data.isolate_documents:
        return length
    lengths = [dataset.attended_length(length) for dataset in data.train]
    return sum(map(operator.mul, lengths, data.weights)) / sum(data.weights)


def log_evaluation(config: RecipeConfig, session: Session, data: Prepared, step: int) -> None:
    mesh = session.mesh
    rows = (config.evaluate and config.evaluate.batch_size) or session.rows
    for name, dataset in data.validation.items():
        held_out = Sequential(
            dataset,
            sequence_length=config.training.sequence_length,
            batch_size=rows * mesh.data_size,
            rank=mesh.data_rank,
            world=mesh.data_size,
            isolate_documents=config.data.isolate_documents,
        )
        tokenizer = data.tokenizer
        text_bytes = held_out.predicted_bytes(tokenizer.token_bytes(), tokenizer.token_bytes(opening=True))
        attention = config.training.attention
        result = evaluate_perplexity(session.model, held_out, text_bytes, attention=attention, mesh=mesh)
        session.run.log(step, result.metrics(), kind=evaluation_kind(data, name))


def log_sample(sample: SampleConfig, session: Session, data: Prepared, step: int) -> None:
    text = sample.draw(session.model, data.tokenizer, seed=step, mesh=session.mesh)
    session.run.sample(step, sample.prompt, text)


def evaluation_kind(data: Prepared, name: str) -> str:
    return "evaluate" if len(data.validation) == 1 else f"evaluate/{name}"


def finish(config: RecipeConfig, session: Session, data: Prepared) -> None:
    """Keep the final weights by themselves, and show what came out."""
    run, console = session.run, session.console
    folder = session.save_final()
    if not session.mesh.leads:
        return
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
