"""The one seam between a model and the way its attention is computed.

A model's forward is `model(tokens_BS, context)`. Training, document packing, context parallelism and the inference
cache differ only in the context that is handed in. A context holds tensors and static facts, nothing else, so it
passes through pipeline stages, `torch.compile` and CUDA graphs.

B batch, S sequence, T keys or tokens of whole rows, N number of document boundaries in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from treadle.attention.cache import Cache
from treadle.attention.parts import Parts


@dataclass(frozen=True)
class Keys:
    """What is to be known of keys that are not those of the queries' own tokens.

    query_places_S, places_T: int32, the index of each query and each key in its row, as the row was before it was cut.
    documents_BT: as the context's, of the keys.
    """

    query_places_S: Tensor
    places_T: Tensor
    documents_BT: Tensor | None = None


@dataclass(frozen=True)
class AttentionContext:
    """Where each token stands, and what it may see.

    positions_BS: int32 or int64, the position of each token in its own document (what RoPE and masks read).
    documents_BS: int32, the number of each token's document within its row; None when a row is one document.
    cumulative_lengths_N: int32, document boundaries over the B*S tokens laid end to end, starting with 0; may end in
        repeats of B*S, so that its length can stay fixed from batch to batch. Variable-length kernels read it.
    max_length: an upper bound on the length of a document, in tokens (static).
    backend: the attention backend's name, or "auto" for the measured choice (static).
    cache: what the model keeps of earlier tokens, in inference; as a mixer sees it, what its own `make_cache` made.
    parts: how rows are cut over ranks, where they are; the tensors above are then of this rank's tokens (static).
    whole: the context of the whole rows, where they are cut.
    keys: of keys that come from other tokens than the queries; attention by itself sets it, for its backends.
    tables: tensors that many layers derive from the positions (RoPE's cos and sin), computed once per forward, by key.
    """

    positions_BS: Tensor
    documents_BS: Tensor | None = None
    cumulative_lengths_N: Tensor | None = None
    max_length: int | None = None
    backend: str = "auto"
    cache: Any = None
    parts: Parts | None = None
    whole: Any = None
    keys: Keys | None = None
    tables: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def causal(
        cls, batch: int, length: int, *, device: torch.device | str | None = None, backend: str = "auto"
    ) -> Self:
        """`batch` rows of one document each."""
        positions_BS = torch.arange(length, device=device, dtype=torch.int32).expand(batch, length)
        return cls(positions_BS, max_length=length, backend=backend)

    @classmethod
    def packed(cls, documents_BS: Tensor, *, boundaries: int | None = None, backend: str = "auto") -> Self:
        """Rows of several documents, numbered in increasing order within each row. They never see each other.

        `boundaries` fixes the length of `cumulative_lengths_N` (at least the number of documents + 1).
        """
        B, S = documents_BS.shape
        starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
        starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
        index_S = torch.arange(S, device=documents_BS.device, dtype=torch.int32)
        first_BS = torch.cummax(torch.where(starts_BS, index_S, 0), dim=1).values
        begins_N = starts_BS.flatten().nonzero().flatten().to(torch.int32)
        size = max(boundaries or 0, begins_N.numel() + 1)
        cumulative_N = torch.full((size,), B * S, dtype=torch.int32, device=documents_BS.device)
        cumulative_N[: begins_N.numel()] = begins_N
        return cls(index_S - first_BS, documents_BS.to(torch.int32), cumulative_N, S, backend)

    def cut(self, parts: Parts) -> Self:
        """The context of this rank's tokens; self is that of the whole rows."""
        documents_BS = None if self.documents_BS is None else parts.cut(self.documents_BS)
        changed: Any = {"documents_BS": documents_BS, "cumulative_lengths_N": None, "tables": {}}
        return replace(self, positions_BS=parts.cut(self.positions_BS), parts=parts, whole=self, **changed)

    def for_layer(self, layer: int) -> Self:
        """The context as one layer sees it: the same, with only this layer's part of the cache."""
        return replace(self, cache=self.cache[layer]) if isinstance(self.cache, Cache) else self

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same context with `function` applied to each of its tensors; not to the cache, and without tables."""
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: Any = {name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)}
        if self.whole is not None:
            changed["whole"] = self.whole.map(function)
        return replace(self, **changed, tables={})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))
