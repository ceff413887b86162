"""Train short, test long (Press et al. 2021, arXiv:2108.12409): held-out text in windows of several lengths."""

from collections.abc import Iterable
from pathlib import Path

from treadle.config import resolve
from treadle.data.config import DataConfig
from treadle.data.loader import Sequential
from treadle.data.prepare import Prepared, prepare
from treadle.errors import ConfigError
from treadle.evaluate.perplexity import Perplexity, evaluate_perplexity
from treadle.nn.absolute_position import Learned
from treadle.nn.transformer import Transformer
from treadle.tracking.read import load_config


def data_of(folder: Path | str) -> Prepared:
    """The data that a pretraining run was trained and validated on, from its cache where that is still there."""
    return prepare(resolve(DataConfig, load_config(folder)["data"]))


def evaluate_lengths(
    model: Transformer, data: Prepared, lengths: Iterable[int], *, batch_tokens: int = 16384, attention: str = "auto"
) -> dict[str, dict[int, Perplexity]]:
    """By held-out dataset and window length.

    The stream of documents is cut into windows that do not overlap, so each predicted token sees half a window on
    average, and documents in a window see each other. The tokens that are predicted are the same ones at every length.
    batch_tokens: at a time. Raises ConfigError for a length beyond a learned position table.
    """
    token_bytes, opening_bytes = data.tokenizer.token_bytes(), data.tokenizer.token_bytes(opening=True)
    results: dict[str, dict[int, Perplexity]] = {name: {} for name in data.validation}
    for length in lengths:
        check_length(model, length)
        for name, dataset in data.validation.items():
            rows = max(1, batch_tokens // length)
            windows = Sequential(dataset, sequence_length=length, batch_size=rows, isolate_documents=False)
            text_bytes = windows.predicted_bytes(token_bytes, opening_bytes)
            results[name][length] = evaluate_perplexity(model, windows, text_bytes, attention=attention)
    return results


def check_length(model: Transformer, length: int) -> None:
    if isinstance(model.position, Learned) and length > model.position.length:
        raise ConfigError(
            f"windows of {length} tokens: the model's learned positions end at {model.position.length}; choose shorter "
            f"ones, or train a model with relative positions"
        )
