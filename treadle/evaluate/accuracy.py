"""How many answers a model gets right: the likeliest token at each place that counts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from treadle.config import Config
from treadle.data.batches import Batches
from treadle.data.packing import Batch
from treadle.kernels.linear_cross_entropy import IGNORED
from treadle.nn.transformer import Transformer
from treadle.parallel.context import own_part
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import at_the_end


class AccuracyConfig(Config):
    """Held-out samples of a task, of which training sees none. They are the same for every seed of the run."""

    every: PositiveInt | None = Field(None, description="steps between evaluations; null: only at the end")
    samples: PositiveInt = Field(1024, description="rows that are answered")


@dataclass(frozen=True)
class Accuracy:
    """correct: of `answers` places, those whose likeliest token is the target. rows_correct: rows without a miss."""

    correct: int
    answers: int
    rows_correct: int
    rows: int

    def metrics(self) -> dict[str, float]:
        return {"accuracy": self.correct / self.answers, "row_accuracy": self.rows_correct / self.rows}


@torch.no_grad()
def evaluate_accuracy(
    model: Transformer, batches: Iterable[Batch], *, attention: str = "auto", mesh: Mesh | None = None
) -> Accuracy:
    """Answer every target of `batches` that is not -100. attention: the backend. The model's mode is left as it was.

    mesh: the processes that share the samples; each has as many batches as the others (`shared_out`). Raises
    ValueError where no target is there to be answered.
    """
    mesh = mesh or Mesh()
    device, training = model.device, model.training
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    answers = rows = 0
    for batch in batches:
        own = own_part(batch, mesh, device)
        found = at_the_end(model, partial(_correct, batch=own, attention=attention, mesh=mesh))
        counts += 0 if found is None else found
        answers, rows = answers + batch.valid_tokens, rows + int((batch.targets_BS != IGNORED).any(dim=1).sum())
    model.train(training)
    # The ranks that share a row have all counted it.
    shared = mesh.layout.context
    correct, rows_correct = (mesh.sum_stages(mesh.sum(counts)) // shared).tolist()
    answers, rows = (count // shared for count in mesh.sum_counts(answers, rows))
    if answers == 0:
        raise ValueError("no row has a target to answer: all are -100")
    return Accuracy(correct, answers, rows_correct, rows)


def _correct(model: Transformer, batch: Batch, attention: str, mesh: Mesh) -> Tensor:
    """Right answers, and rows with nothing but those; of whole rows, where processes hold parts.  -> counts_2"""
    hidden_BSD = model.hidden(batch.tokens_BS, replace(batch.context, backend=attention))
    asked_BS = batch.targets_BS != IGNORED
    right_BS = torch.zeros_like(asked_BS)
    right_BS[asked_BS] = model.head(hidden_BSD[asked_BS]).argmax(-1) == batch.targets_BS[asked_BS]
    asked_B, right_B = mesh.sum_parts(torch.stack((asked_BS.sum(dim=1), right_BS.sum(dim=1)))).unbind()
    return torch.stack((right_B.sum(), ((right_B == asked_B) & (asked_B > 0)).sum()))


def shared_out(data: Batches, samples: int, rows: int, mesh: Mesh) -> Iterator[Batch]:
    """This process's batches of the first `samples` samples, as many as others have: the last may lack targets."""
    for start in range(0, samples, mesh.data_size * rows):
        first = start + mesh.data_rank * rows
        if first < samples:
            yield data.samples(first, min(first + rows, samples))
        else:
            idle = data.samples(0, 1)
            yield replace(idle, targets_BS=torch.full_like(idle.targets_BS, IGNORED), valid_tokens=0)
