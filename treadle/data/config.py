"""The `data` section of a recipe: text to prepare, or tokens that are already prepared."""

from abc import abstractmethod
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny, model_validator

from treadle.config import Config, Kind, key_error
from treadle.data.dataset import TokenDataset
from treadle.data.megatron import MegatronDataset
from treadle.data.shards import MANIFEST, TRAIN, VALIDATION, ShardDataset
from treadle.data.sources import SourceConfig
from treadle.data.tokenizer import Tokenizer, TokenizerConfig


class TokensConfig(Kind):
    """A dataset that is already tokens."""

    weight: PositiveFloat | None = Field(
        None, description="share of the training samples, relative to the other datasets; none: by number of tokens"
    )

    @abstractmethod
    def open(self, tokenizer: Tokenizer) -> tuple[TokenDataset, TokenDataset | None]:
        """The training data and, if there is any, the validation data; `tokenizer` reads it. Raises DataError."""


class ShardsConfig(TokensConfig):
    """A folder that `treadle data prepare` has written (with train/ and validation/), or one folder of shards."""

    kind: Literal["shards"] = "shards"
    path: Path = Field(description="the folder")

    def open(self, tokenizer: Tokenizer) -> tuple[TokenDataset, TokenDataset | None]:
        if (self.path / MANIFEST).is_file():
            return ShardDataset(self.path), None
        validation = ShardDataset(self.path / VALIDATION) if (self.path / VALIDATION).is_dir() else None
        return ShardDataset(self.path / TRAIN), validation


class MegatronConfig(TokensConfig):
    """A Megatron-LM indexed dataset: `path`.bin and `path`.idx."""

    kind: Literal["megatron"] = "megatron"
    path: Path = Field(description="the prefix: the files' path without .bin and .idx")
    validation: Path | None = Field(None, description="the prefix of the held-out data, if there is any")
    vocab_size: PositiveInt | None = Field(
        None, description="refuse token ids from here on; none: the tokenizer's size"
    )

    def open(self, tokenizer: Tokenizer) -> tuple[TokenDataset, TokenDataset | None]:
        vocab_size = self.vocab_size or tokenizer.vocab_size

        def opened(prefix: Path) -> MegatronDataset:
            return MegatronDataset(prefix, vocab_size=vocab_size, eos_id=tokenizer.eos_id)

        return opened(self.path), None if self.validation is None else opened(self.validation)


class DataConfig(Config):
    """What a run trains on. Set `sources` (text, prepared and cached at first use) or `datasets` (tokens), not both."""

    sources: list[SerializeAsAny[SourceConfig]] = Field([], description="text to tokenise, each with its `kind`")
    datasets: list[SerializeAsAny[TokensConfig]] = Field(
        [], description="tokens already prepared, each with its `kind`"
    )
    tokenizer: SerializeAsAny[TokenizerConfig] | None = Field(
        None, description="how text becomes tokens; none: the tokenizer that lies beside the first of `datasets`"
    )
    held_out: float = Field(
        0.01, ge=0, lt=1, description="fraction of the documents, chosen by hash, kept out of training for validation"
    )
    isolate_documents: bool = Field(True, description="whether documents in one row are hidden from each other")
    cache: Path = Field(Path("cache"), description="folder for prepared tokens and trained tokenizers")
    workers: PositiveInt | None = Field(
        None, description="processes that tokenise; none: one per core that this process may use"
    )

    @model_validator(mode="after")
    def _text_or_tokens(self) -> "DataConfig":
        if bool(self.sources) == bool(self.datasets):
            state = "both are set" if self.sources else "neither is set"
            raise key_error(
                "sources",
                f"{state} of `sources` (text) and `datasets` (prepared tokens); set exactly one, for example "
                f"`sources: [{{kind: text, paths: corpus/*.txt}}]`",
            )
        if self.sources and self.tokenizer is None:
            raise key_error(
                "tokenizer", "null, but `sources` are text; set `{kind: train, vocab_size: 8192}`, or `bytes`"
            )
        return self

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> "DataConfig":
        weights = {
            "sources": [source.weight for source in self.sources],
            "datasets": [dataset.weight for dataset in self.datasets],
        }
        for key, values in weights.items():
            if None in values and any(values):
                message = f"null, but other {key} have a weight; give every one a weight, or none"
                raise key_error(f"{key}.{values.index(None)}.weight", message)
        return self
