"""How well a model predicts held-out text: nats per token, perplexity, bits per byte."""

import math
from dataclasses import dataclass, replace

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from treadle.config import Config
from treadle.data.loader import Sequential
from treadle.nn.transformer import Transformer
from treadle.parallel.context import own_part
from treadle.parallel.mesh import Mesh


class EvaluateConfig(Config):
    """Held-out text, measured in bits per byte."""

    every: PositiveInt | None = Field(None, description="steps between evaluations; null: only at the end")
    batch_size: PositiveInt | None = Field(None, description="rows at a time; null: as many as training's micro-batch")
    ngram: NonNegativeInt = Field(0, le=7, description="order of a byte n-gram model to compare with; 0: none")


@dataclass(frozen=True)
class Perplexity:
    """nats: summed over `tokens` predicted tokens, which stand for `bytes` of UTF-8 text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of nats per token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the other two."""
        return self.nats / math.log(2) / self.bytes

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


@torch.no_grad()
def evaluate_perplexity(
    model: Transformer, data: Sequential, text_bytes: int, *, attention: str = "auto", mesh: Mesh | None = None
) -> Perplexity:
    """Predict every token of `data` once.

    text_bytes: of the predicted tokens (`Sequential.predicted_bytes`). attention: the backend. mesh: the processes
    that share `data`, each with its rows. The model's mode and gradients are left as they were.
    """
    mesh = mesh or Mesh()
    device, training = model.device, model.training
    model.eval()
    nats, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in data:
        own = own_part(batch, mesh, device)
        hidden_BSD = model.hidden(own.tokens_BS, replace(own.context, backend=attention))
        nats += model.head.cross_entropy(hidden_BSD, own.targets_BS)
        tokens += own.valid_tokens
    model.train(training)
    return Perplexity(mesh.sum(nats).item(), mesh.sum_counts(tokens)[0], text_bytes)
