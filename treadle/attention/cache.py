"""The state that a model keeps between calls in inference. Each mixer makes its own layer's part (`make_cache`).

B batch, S new tokens, T cached tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class TokenCache:
    """What a layer keeps of every token, keys and values say: one buffer each, of all rows' same length."""

    in_pages = False

    def __init__(
        self,
        batch: int,
        capacity: int,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        """shapes: of one token's part of each buffer."""
        self.capacity, self.length = capacity, 0
        self.buffers = [torch.zeros(batch, capacity, *shape, dtype=dtype, device=device) for shape in shapes]

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store the new tokens' tensors [B, S, ...]; return all that are stored [B, T, ...], oldest first."""
        start, self.length = self.length, self.length + new[0].shape[1]
        if self.length > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {self.length} are needed")
        for buffer, tensor in zip(self.buffers, new, strict=True):
            buffer[:, start : self.length] = tensor
        return tuple(buffer[:, : self.length] for buffer in self.buffers)

    def fresh(self, queries: int) -> bool:
        """Whether the queries' own tokens are all there are: it was empty before them."""
        return self.length == queries


class Cache:
    """The caches of the layers of a model that are here, by the layer's number."""

    def __init__(self, layers: Mapping[int, Any]):
        self.layers = dict(layers)

    def __getitem__(self, layer: int) -> Any:
        return self.layers[layer]
