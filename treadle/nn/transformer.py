"""The decoder: embedding, a stack of layers, a norm, a head.

B batch, S sequence, D model dim, V vocabulary.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from treadle.attention import AttentionContext, Cache
from treadle.attention import tables as attention_tables
from treadle.config import Config
from treadle.config.base import key_errors
from treadle.kernels.linear_cross_entropy import linear_cross_entropy
from treadle.nn.config import AbsolutePositionConfig, Buildable, LayerConfig, MultiTokenConfig, NormConfig
from treadle.nn.init import InitConfig, NormalInitConfig, Pieces, initialise, whole_piece
from treadle.nn.linear import Embedding
from treadle.nn.norm import RMSNormConfig


class TransformerConfig(Buildable, Config):
    """The whole architecture. `build()` gives the module, on the current default device, uninitialised."""

    dim: PositiveInt = Field(description="model dim: the width of the residual stream")
    vocab_size: PositiveInt | None = Field(
        None, description="rows of the embedding; null: the tokenizer's, up to a multiple of 64"
    )
    max_length: PositiveInt = Field(description="longest sequence the model is meant for, in tokens")
    position: AbsolutePositionConfig | None = Field(
        None, description="a vector per position, added to the embedding; null: none (attention has its own positions)"
    )
    embedding_scale: PositiveFloat = Field(1.0, description="factor on the embedding (Gemma: sqrt(dim); Granite)")
    embedding_norm: NormConfig | None = Field(None, description="norm of the embedding (BLOOM); null: none")
    layers: list[LayerConfig] = Field(min_length=1, description="the stack, from input to output")
    norm: NormConfig = Field(RMSNormConfig(), description="the norm before the head")
    tied: bool = Field(False, description="the head shares the embedding's weight")
    logits_scale: PositiveFloat = Field(1.0, description="factor on the logits (Granite: 1 / logits_scaling)")
    softcap: PositiveFloat | None = Field(None, description="logits become cap * tanh(logits / cap)")
    multi_token: MultiTokenConfig | None = Field(
        None, description="what predicts further than the next token, in training; null: nothing"
    )
    init: InitConfig = Field(NormalInitConfig(), description="how weights start")

    @model_validator(mode="after")
    def _check_layers(self) -> "TransformerConfig":
        problems = [
            (f"layers.{index}.{key}", message)
            for index, layer in enumerate(self.layers)
            for key, message in layer.problems(self.dim)
        ]
        if self.position is not None:
            problems += [(f"position.{key}", message) for key, message in self.position.problems(self.dim)]
        if self.multi_token is not None:
            found = self.multi_token.problems(self.dim, self.max_length)
            problems += [(f"multi_token.{key}", message) for key, message in found]
        if problems:
            raise key_errors(problems)
        return self

    def expand(self) -> list[LayerConfig]:
        """The layers one by one, patterns unrolled."""
        return [layer for entry in self.layers for layer in entry.expand()]


class Head(nn.Module):
    """Hidden states to scores over the vocabulary.  x_BSD -> logits_BSV"""

    roles = {"weight": "vocab"}

    def __init__(self, vocabulary: int, dim: int, softcap: float | None, scale: float = 1.0):
        super().__init__()
        self.softcap, self.scale = softcap, scale
        self.weight = nn.Parameter(torch.empty(vocabulary, dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        logits_BSV = nn.functional.linear(self._scaled(x_BSD), self.weight.to(x_BSD.dtype))
        return logits_BSV if self.softcap is None else self.softcap * torch.tanh(logits_BSV / self.softcap)

    def cross_entropy(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Sum of cross entropies over the targets that are not -100, without ever holding all logits.  -> scalar"""
        return self.penalised_cross_entropy(x_BSD, targets_BS)[0]

    def penalised_cross_entropy(
        self, x_BSD: Tensor, targets_BS: Tensor, *, z_loss: float = 0.0, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The same, of targets a share `smoothing` of which is spread over the vocabulary, plus
        z_loss * logsumexp(logits)^2 for each of them; and that penalty alone, detached."""
        tokens_TD, targets_T = self._scaled(x_BSD).flatten(0, 1), targets_BS.flatten()
        options: dict[str, Any] = {"softcap": self.softcap, "z_loss": z_loss, "smoothing": smoothing}
        return linear_cross_entropy(tokens_TD, self.weight, targets_T, **options)

    def _scaled(self, x_BSD: Tensor) -> Tensor:
        return x_BSD if self.scale == 1.0 else x_BSD * self.scale

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class Transformer(nn.Module):
    """A decoder-only language model.

    `dtype` is the compute dtype: the embedding's output has it and everything after follows; weights keep their own.
    Layers are named by their number in the whole stack, also where a pipeline stage holds only some of them.
    """

    roles = {"embedding": "vocab"}

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set; give a number, or a tokenizer to take it from")
        self.config = config
        self.dtype = torch.float32
        self.compute_device: torch.device | None = None
        self._shared: tuple[list[nn.Module], list[Any], list[Any]] | None = None
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.embedding_norm = config.embedding_norm.build(config.dim) if config.embedding_norm else None
        self.position = config.position.build(config.dim, config.max_length) if config.position else None
        layers = config.expand()
        self.layers = nn.ModuleDict(
            {str(i): layer.build(config.dim, config.max_length) for i, layer in enumerate(layers)}
        )
        self.last = str(len(layers) - 1)
        self.norm = config.norm.build(config.dim)
        self.head = Head(config.vocab_size, config.dim, config.softcap, config.logits_scale)
        self.multi_token = None
        if config.multi_token is not None:
            self.multi_token = config.multi_token.build(config.dim, config.max_length, layers[-1])
        self.tie()

    def tie(self) -> None:
        if self.config.tied and self.head is not None:  # a stage of a pipeline may have none
            self.head.weight = self.embedding.weight

    def to_empty(self, *, device: Any, recurse: bool = True) -> "Transformer":
        """As in PyTorch, which would leave a tied model with two weights when it comes from the meta device."""
        super().to_empty(device=device, recurse=recurse)
        self.tie()
        return self

    def forward(self, tokens_BS: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Scores for the next token at each position.  tokens_BS -> logits_BSV in the compute dtype"""
        return self.head(self.hidden(tokens_BS, context))

    def hidden(self, tokens_BS: Tensor, context: AttentionContext | None = None) -> Tensor:
        """What the head reads. Without a context each row is one document.  tokens_BS -> x_BSD"""
        context = context or AttentionContext.causal(*tokens_BS.shape, device=tokens_BS.device)
        return self.segment(None, tokens_BS, context, tuple(self.layers))

    def segment(
        self, x_BSD: Tensor | None, tokens_BS: Tensor, context: AttentionContext, layers: Collection[str]
    ) -> Tensor:
        """Some layers, one after the other, by their numbers: what a pipeline stage computes.  -> x_BSD

        x_BSD: of the layer before them, None for the first, which takes the embedding. After the last of the whole
        stack comes the norm.
        """
        context = self.with_tables(context)
        if x_BSD is None:
            x_BSD = self.embed(tokens_BS)
            if self.position is not None:
                x_BSD = x_BSD + self.position(context.positions_BS, self.dtype)
        for index in layers:
            x_BSD = self.layers[index](x_BSD, context.for_layer(int(index)))
            if index == self.last:
                x_BSD = self.norm(x_BSD)
        return x_BSD

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """The embedding, scaled and normed as the model has it, without positions.  tokens_BS -> x_BSD"""
        x_BSD = self.embedding(tokens_BS, self.dtype)
        if self.config.embedding_scale != 1.0:
            x_BSD = x_BSD * self.config.embedding_scale
        return x_BSD if self.embedding_norm is None else self.embedding_norm(x_BSD)

    def further(self, x_BSD: Tensor, tokens_BS: Tensor, context: AttentionContext) -> list[Tensor]:
        """What the head reads to predict 1, 2, ... tokens further than the next, where the model has `multi_token`.

        x_BSD: of `hidden`, for the same tokens and context, which has no cache.  -> [x_BSD] * depth
        """
        if self.multi_token is None:
            return []
        return self.multi_token(x_BSD, tokens_BS, self.with_tables(context), self.embed)  # type: ignore[no-any-return]

    def with_tables(self, context: AttentionContext) -> AttentionContext:
        """The context with what layers derive from its positions, once for all that share it; what it has stays."""
        sources, mixers = self._sharing()
        tables = dict(context.tables)
        for key, source in {source.key: source for source in sources}.items():
            if key not in tables:
                tables[key] = source.tables(context)
        for facts, head_dims in dict.fromkeys((mixer.facts, mixer.head_dims) for mixer in mixers):
            tables |= attention_tables(facts, head_dims, self.dtype, replace(context, tables=tables))
        return replace(context, tables=tables)

    def _sharing(self) -> tuple[list[Any], list[Any]]:
        """The modules that have tables, and those that have attention facts.

        Kept from one forward to the next, as asking each module takes a large part of the host's time for a token. Any
        module that was added, replaced or taken away since makes it search anew.
        """
        modules = _descendants(self)
        if self._shared is None or self._shared[0] != modules:
            sources = [module for module in modules if hasattr(module, "tables")]
            mixers = [module for module in modules if hasattr(module, "facts")]
            self._shared = (modules, sources, mixers)
        return self._shared[1], self._shared[2]

    def initialise(self, seed: int, *, pieces: Pieces = whole_piece) -> "Transformer":
        """Fill all weights, or the pieces of each that are here; see `treadle.nn.init`."""
        initialise(self, self.config.init, seed=seed, depth=len(self.config.expand()), pieces=pieces)
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes; weights that are offloaded lie elsewhere."""
        return self.compute_device or self.embedding.weight.device

    def make_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        device = self.device
        mixers: dict[int, Any] = {int(index): layer.mixer for index, layer in self.layers.items()}
        return Cache({i: mixer.make_cache(batch, capacity, self.dtype, device) for i, mixer in mixers.items()})


def _descendants(module: nn.Module) -> list[nn.Module]:
    """What `module.modules()` gives, less itself: a model that holds itself is freed late."""
    found = [child for child in module._modules.values() if child is not None]
    for each in found:  # which grows meanwhile
        found += [child for child in each._modules.values() if child is not None]
    return found
