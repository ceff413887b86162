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
from treadle.inference.load import FINAL, TOKENIZER
from treadle.inference.text import SampleConfig
from treadle.nn.store import save_model
from treadle.nn.transformer import Transformer
from treadle.tracking.plot import plot_training
from treadle.tracking.read import load_metrics, load_samples
from treadle.tracking.run import Run
from treadle.train.callbacks import Callback, Every
from treadle.train.losses import cross_entropy
from treadle.train.session import SessionConfig, open_session
from treadle.train.setup import find_device, with_vocabulary


class RecipeConfig(SessionConfig):
    """A pretraining run."""

    recipe: Literal["pretrain"] = "pretrain"
    name: str = Field("pretrain", description="name of the run")
    data: DataConfig
    evaluate: EvaluateConfig | None = Field(EvaluateConfig(), description="held-out text; null: none")
    sample: SampleConfig | None = Field(SampleConfig(), description="text sampled on the way; null: none")


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
    with open_session(config, spec, loader, sinks, device=device, resume=resume, console=console) as session:
        run, model = session.run, session.model
        data.tokenizer.save(run.folder / TOKENIZER)
        session.announce(f"{sum(dataset.tokens for dataset in data.train):,} training tokens")
        loss = partial(cross_entropy, z_loss=config.training.z_loss, attention=config.training.attention)
        around = evaluations(config, run, model, data)
        if session.train(loss, around, length=attended_length(config, data)):
            finish(config, run, model, data, console)
    return run.folder


def evaluations(config: RecipeConfig, run: Run, model: Transformer, data: Prepared) -> list[Callback]:
    """What is looked at on the way."""
    around: list[Callback] = []
    if config.evaluate is not None:
        around.append(Every(config.evaluate.every, partial(log_evaluation, config, run, model, data)))
    if config.sample is not None:
        around.append(Every(config.sample.every, partial(log_sample, config.sample, run, model, data)))
    return around


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
