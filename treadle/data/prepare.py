"""From a `data` section to datasets: text is tokenised once, and found again in the cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.data.cache import build_once, key_of
from treadle.data.config import DataConfig
from treadle.data.dataset import TokenDataset
from treadle.data.shards import TRAIN, VALIDATION, VERSION, ShardDataset
from treadle.data.sources import SourceConfig
from treadle.data.tokenize import drawn, is_held_out, tokenize
from treadle.data.tokenizer import Tokenizer, TrainTokenizerConfig
from treadle.errors import DataError


@dataclass(frozen=True)
class Prepared:
    """What a run trains and validates on.

    folders: where the tokens lie. train: one dataset for each source, with its weight. validation: by name, those
    sources that have a held-out document.
    """

    folders: tuple[Path, ...]
    tokenizer: Tokenizer
    train: tuple[TokenDataset, ...]
    weights: tuple[float, ...]
    validation: dict[str, TokenDataset]


def prepare(config: DataConfig, cache_root: Path | str | None = None, *, progress: bool = True) -> Prepared:
    """The datasets of a `data` section; its text is tokenised first, unless that is in the cache.

    cache_root: instead of `config.cache`. Processes that ask for the same data at the same time wait for the first one.
    Raises DataError.
    """
    if config.datasets:
        return opened(config)
    root = Path(config.cache if cache_root is None else cache_root).expanduser()
    signatures = [source.signature() for source in config.sources]
    tokenizer = prepared_tokenizer(config, signatures, root)
    folders = [
        prepared_source(source, signature, tokenizer, config, root, progress)
        for source, signature in zip(config.sources, signatures, strict=True)
    ]
    members = [(ShardDataset(folder / TRAIN), ShardDataset(folder / VALIDATION)) for folder in folders]
    names = [source.kind for source in config.sources]  # type: ignore[attr-defined]
    weights = [source.weight for source in config.sources]
    return assembled(folders, tokenizer, members, names, weights, config.held_out)


def opened(config: DataConfig) -> Prepared:
    """The datasets of a section that names prepared tokens."""
    paths = [dataset.path for dataset in config.datasets]  # type: ignore[attr-defined]
    if config.tokenizer is not None:
        tokenizer = config.tokenizer.build()
    else:
        tokenizer = Tokenizer.load(paths[0] / "tokenizer")
    members = [dataset.open(tokenizer) for dataset in config.datasets]
    for train, _ in members:
        check_tokenizer(train, tokenizer)
    weights = [dataset.weight for dataset in config.datasets]
    return assembled(paths, tokenizer, members, [path.name for path in paths], weights, 0)


def check_tokenizer(dataset: TokenDataset, tokenizer: Tokenizer) -> None:
    if dataset.tokenizer is not None and dataset.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{dataset.path}: made with tokenizer {dataset.tokenizer[:16]}, this one is {tokenizer.fingerprint[:16]}; "
            f"leave `tokenizer` out to use the one beside the tokens, or prepare the text again"
        )


def assembled(
    folders: Sequence[Path],
    tokenizer: Tokenizer,
    members: Sequence[tuple[TokenDataset, TokenDataset | None]],
    names: Sequence[str],
    weights: Sequence[float | None],
    held_out: float,
) -> Prepared:
    """All of it, once there is something to train on, and to validate on where that was asked for. Raises DataError."""
    for name, (train, _) in zip(names, members, strict=True):
        if train.tokens == 0:
            raise DataError(f"{name} ({train.path}): no document to train on; add text, or lower held_out={held_out}")
    unique = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]
    validation = {name: held for name, (_, held) in zip(unique, members, strict=True) if held and held.tokens > 1}
    if held_out > 0 and not validation:
        documents = sum(train.documents for train, _ in members)
        raise DataError(
            f"held_out: {held_out} of {documents} documents left none for validation; cut the text into more documents "
            f"(a text source has `separator`), raise held_out, or set held_out: 0 to train without validation"
        )
    datasets = tuple(dataset for dataset, _ in members)
    shares = tuple(float(weight or dataset.tokens) for weight, dataset in zip(weights, datasets, strict=True))
    return Prepared(tuple(folders), tokenizer, datasets, shares, validation)


def prepared_tokenizer(config: DataConfig, signatures: Sequence[Any], cache_root: Path) -> Tokenizer:
    """The tokenizer, trained on the sources if it is of that kind and not in the cache yet."""
    kind = config.tokenizer
    assert kind is not None, "DataConfig has checked it"
    if not isinstance(kind, TrainTokenizerConfig):
        return kind.build()

    def make(folder: Path) -> None:
        kind.build(training_text(config.sources, config.held_out, kind.max_bytes)).save(folder)

    key = key_of(VERSION, kind.model_dump(mode="json"), signatures, config.held_out)
    return Tokenizer.load(build_once(cache_root / "tokenizers" / key, make))


def training_text(sources: Sequence[SourceConfig], held_out: float, max_bytes: int) -> Iterator[str]:
    """Training documents of all sources, an equal part of `max_bytes` from each; no held-out document.

    Of a larger source, documents chosen by hash all over it: its first files are seldom like the rest.
    """
    for source in sources:
        left = max_bytes // len(sources)
        share = left / max(1, sum(piece.size for piece in source.pieces()))
        for document in source.documents():
            text = document.encode()
            chosen = share >= 1 or drawn(text, share, salt=b"tokenizer")
            if chosen and not is_held_out(text, held_out):
                yield document
                left -= len(text)
                if left <= 0:
                    break


def prepared_source(
    source: SourceConfig, signature: Any, tokenizer: Tokenizer, config: DataConfig, cache_root: Path, progress: bool
) -> Path:
    """The folder with the source's train/ and validation/ shards."""

    def make(folder: Path) -> None:
        tokenize(source, tokenizer, folder, held_out=config.held_out, workers=config.workers, progress=progress)
        if source.signature() != signature:
            raise DataError(f"a file of source {signature['config']} changed while it was read; prepare the data again")

    key = key_of(VERSION, signature, tokenizer.fingerprint, config.held_out)
    return build_once(cache_root / "tokens" / f"{source.kind}-{key}", make)  # type: ignore[attr-defined]
