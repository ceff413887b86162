"""How well a model predicts held-out text: nats per token, perplexity, bits per byte."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from treadle.config import Config
from treadle.data.loader import Sequential
from treadle.data.packing import Batch
from treadle.nn.transformer import Transformer
from treadle.parallel.context import own_part
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import at_the_end


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
        found = at_the_end(model, partial(_nats, batch=own, attention=attention))
        nats += 0 if found is None else found
        tokens += own.valid_tokens
    model.train(training)
    return Perplexity(mesh.sum_stages(mesh.sum(nats)).item(), mesh.sum_counts(tokens)[0], text_bytes)


def _nats(model: Transformer, batch: Batch, attention: str) -> Tensor:
    hidden_BSD = model.hidden(batch.tokens_BS, replace(batch.context, backend=attention))
    return model.head.cross_entropy(hidden_BSD, batch.targets_BS)
