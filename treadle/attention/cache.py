"""The state that a model keeps between calls in inference: one layer's part is whatever its mixer declares.

B batch, S new tokens, T cached tokens, G key-value heads, K head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, in one contiguous buffer per row; all rows hold the same length."""

    def __init__(
        self, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.k_BTGK = torch.zeros(batch, capacity, kv_heads, head_dim, dtype=dtype, device=device)
        self.v_BTGK = torch.zeros_like(self.k_BTGK)
        self.length = 0

    def append(self, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; return all that are stored, oldest first."""
        start, self.length = self.length, self.length + k_BSGK.shape[1]
        if self.length > self.k_BTGK.shape[1]:
            raise ValueError(f"the cache holds {self.k_BTGK.shape[1]} tokens, {self.length} are needed")
        self.k_BTGK[:, start : self.length] = k_BSGK
        self.v_BTGK[:, start : self.length] = v_BSGK
        return self.k_BTGK[:, : self.length], self.v_BTGK[:, : self.length]


class Cache:
    """The caches of all layers of a model, indexed by the layer's number."""

    def __init__(self, layers: Sequence[LayerCache]):
        self.layers = list(layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]
