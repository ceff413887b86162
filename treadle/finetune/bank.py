"""Several LoRA adapters beside the same weights, one chosen for each row of a batch.

The pairs of all adapters lie in one tensor, padded to the largest rank with zeros; each row gathers its own and is
multiplied with it in one batched matmul, whatever the mixture. Adapter 0 is none: zeros.

B batch, S sequence, I inputs, O outputs, R rank, N adapters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from treadle.config.base import nearest
from treadle.errors import ConfigError
from treadle.finetune.adapted import AdaptedLinear, adapt, adapted
from treadle.finetune.lora import LoRA
from treadle.nn.transformer import Transformer


class Bank(nn.Module):
    """The pairs of one part of a layer; what is added to each row's output is that of its adapter.

    rows: the number of the adapter of each row, int64 [B]; the same tensor in all banks of a model.
    """

    def __init__(self, pairs: Sequence[LoRA | None], rows: "Rows"):
        super().__init__()
        present = [pair for pair in pairs if pair is not None]
        A_RI, B_OR = present[0].A.weight, present[0].B.weight
        rank = max(pair.rank for pair in present)
        self.register_buffer("A_NRI", A_RI.new_zeros(len(pairs) + 1, rank, A_RI.shape[1]))
        self.register_buffer("B_NOR", B_OR.new_zeros(len(pairs) + 1, B_OR.shape[0], rank))
        for number, pair in enumerate(pairs, start=1):
            if pair is not None:
                self.A_NRI[number, : pair.rank] = pair.A.weight.detach()
                self.B_NOR[number, :, : pair.rank] = pair.scale * pair.B.weight.detach()
        self.rows = rows

    A_NRI: Tensor
    B_NOR: Tensor

    def forward(self, x_BSI: Tensor, y_BSO: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        rows_B = self.rows.numbers_B
        if rows_B is None:
            return y_BSO
        A_BRI, B_BOR = (tensor[rows_B].to(x_BSI.dtype) for tensor in (self.A_NRI, self.B_NOR))
        return torch.baddbmm(y_BSO, x_BSI @ A_BRI.transpose(1, 2), B_BOR.transpose(1, 2))


class Rows:
    """What all banks of a model read. numbers_B: None where no adapter is chosen for any row."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.numbers_B: Tensor | None = None


def add_banks(model: Transformer, adapters: Mapping[str, Transformer]) -> None:
    """Put the LoRA updates of these models, all of the weights that `model` has, beside it, by name; for inference.

    Raises ConfigError for updates of another kind.
    """
    layers: dict[str, dict[str, Any]] = {name: dict(adapted(other)) for name, other in adapters.items()}
    for name, found in layers.items():
        for path, layer in found.items():
            for update in layer.updates.values():
                if type(update) is not LoRA or update.A0 is not None:
                    kind = type(update).__name__
                    raise ConfigError(f"adapter '{name}': {path} has {kind}; a bank holds plain LoRA alone")
    rows = Rows(list(adapters))
    for path in dict.fromkeys(path for found in layers.values() for path in found):
        layer = model.get_submodule(path)
        updates: dict[str, nn.Module] = {}
        for part in getattr(layer, "parts", None) or ["all"]:
            owners = [dict(found[path].updates.items()) if path in found else {} for found in layers.values()]
            pairs = [owner.get(part) for owner in owners]
            if any(pair is not None for pair in pairs):
                updates[part] = Bank(pairs, rows)
        adapt(layer, AdaptedLinear, updates)
    model.adapter_rows = rows  # type: ignore[assignment]


@contextmanager
def use_adapters(model: Transformer, names: Sequence[str | None]) -> Iterator[None]:
    """Within, row b of every batch goes through the adapter names[b] (None: none). Raises ConfigError for others."""
    rows: Any = getattr(model, "adapter_rows", None)
    if rows is None:
        raise ConfigError("the model has no adapters to choose from; put them beside it with add_adapters")
    known = rows.names
    for name in names:
        if name is not None and name not in known:
            raise ConfigError(f"adapter '{name}' is not loaded.{nearest(name, known)}")
    numbers = [0 if name is None else known.index(name) + 1 for name in names]
    before, rows.numbers_B = rows.numbers_B, torch.tensor(numbers, device=model.device)
    try:
        yield
    finally:
        rows.numbers_B = before
