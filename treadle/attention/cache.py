"""The state that a model keeps between calls in inference: one layer's part is whatever its mixer declares.

B batch, S new tokens, T cached tokens (capacity), K key-value heads, H head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, in one contiguous buffer per row; all rows hold the same length."""

    def __init__(self, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.k_BTKH = torch.zeros(batch, capacity, kv_heads, head_dim, dtype=dtype, device=device)
        self.v_BTKH = torch.zeros_like(self.k_BTKH)
        self.length = 0

    def append(self, k_BSKH: Tensor, v_BSKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; return all that are stored, oldest first."""
        start, self.length = self.length, self.length + k_BSKH.shape[1]
        if self.length > self.k_BTKH.shape[1]:
            raise ValueError(f"the cache holds {self.k_BTKH.shape[1]} tokens, {self.length} are needed")
        self.k_BTKH[:, start : self.length] = k_BSKH
        self.v_BTKH[:, start : self.length] = v_BSKH
        return self.k_BTKH[:, : self.length], self.v_BTKH[:, : self.length]


class Cache:
    """The caches of all layers of a model, indexed by the layer's number."""

    def __init__(self, layers: Sequence[LayerCache]):
        self.layers = list(layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]
