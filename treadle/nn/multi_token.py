"""Multi-token prediction: in training each position also predicts the tokens after the next (DeepSeek-V3, 2412.19437).

Position i predicts token i+1 by the model itself, and token i+1+k by the k-th module, k = 1 ... depth. Inference leaves
the modules out.

B batch, S sequence, D model dim.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from treadle.attention import AttentionContext, joined
from treadle.kernels.linear_cross_entropy import IGNORED
from treadle.nn.config import LayerConfig, MultiTokenConfig, NormConfig
from treadle.nn.linear import Linear
from treadle.nn.norm import RMSNormConfig


class SequentialMultiTokenConfig(MultiTokenConfig):
    """Modules one after the other, each with the token that the one before it predicted (arXiv:2412.19437, 2.2)."""

    kind: Literal["sequential"] = "sequential"
    layer: LayerConfig | None = Field(None, description="the layer of each module; null: as the last of the stack")
    norm: NormConfig = Field(RMSNormConfig(), description="the three norms of each module that are around its layer")

    def problems(self, dim: int, max_length: int) -> Iterator[tuple[str, str]]:
        yield from super().problems(dim, max_length)
        if self.layer is None:
            return
        yield from ((f"layer.{key}", message) for key, message in self.layer.problems(dim))
        if (count := len(self.layer.expand())) != 1:
            yield "layer", f"stands for {count} layers, and each module has one; see depth for the number of modules"


class SequentialMultiToken(nn.Module):
    """What the head reads to predict k tokens further than the next: h_k = module_k(h_(k-1), embedding of token i+k).

    h_0 is what the head reads of the model itself, after its last norm: so the released DeepSeek-V3 is run. Embedding
    and head are the model's own. Where token i+k is in another document, or beyond the row, a zero vector stands for
    its embedding: only positions without a k-th further target can see it.
    """

    def __init__(self, config: SequentialMultiTokenConfig, dim: int, max_length: int, last: LayerConfig):
        """last: the last layer of the model's stack."""
        super().__init__()
        (layer,) = (config.layer or last).expand()
        self.layers = nn.ModuleDict(
            {str(k): SequentialModule(layer, config.norm, dim, max_length) for k in range(1, config.depth + 1)}
        )

    def forward(
        self, x_BSD: Tensor, tokens_BS: Tensor, context: AttentionContext, embed: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """embed: tokens_BS -> x_BSD. Returns h_k for each k. Raises ValueError for rows no longer than the depth."""
        length = tokens_BS.shape[1] if context.whole is None else context.whole.positions_BS.shape[1]
        if length <= len(self.layers):
            raise ValueError(
                f"multi_token.depth: {len(self.layers)} needs rows of more than that many tokens, not of "
                f"{length}; use longer rows, or a smaller depth"
            )
        found = []
        for k, module in self.layers.items():
            further_BS = ahead(tokens_BS, int(k), context)
            embedded_BSD = embed(further_BS.clamp(min=0)) * (further_BS != IGNORED)[..., None]
            x_BSD = module(x_BSD, embedded_BSD, context)
            found.append(x_BSD)
        return found


class SequentialModule(nn.Module):
    """norm(layer(project([norm(embedding); norm(x)]))).  x_BSD, embedding_BSD -> y_BSD

    The order of the two is that of the released weights (`eh_proj`); the paper writes the other.
    """

    # Its output is the layer's residual stream itself: nothing that is added to one, as a `row` is, which starts small.
    roles = {"project": "replicate"}

    def __init__(self, layer: LayerConfig, norm: NormConfig, dim: int, max_length: int):
        super().__init__()
        self.embedding_norm, self.hidden_norm = norm.build(dim), norm.build(dim)
        self.project = Linear(2 * dim, dim)
        self.layer = layer.build(dim, max_length)
        self.norm = norm.build(dim)

    def forward(self, x_BSD: Tensor, embedding_BSD: Tensor, context: AttentionContext) -> Tensor:
        both = torch.cat((self.embedding_norm(embedding_BSD), self.hidden_norm(x_BSD)), dim=-1)
        return self.norm(self.layer(self.project(both), context))


def ahead(values_BS: Tensor, k: int, context: AttentionContext) -> Tensor:
    """The value k >= 1 positions further on in the same document; -100 where there is none.  -> values_BS"""
    if context.parts is not None:  # it may be with another rank
        return context.parts.cut(ahead(joined(values_BS, context), k, context.whole))
    moved_BS = F.pad(values_BS[:, k:], (0, k), value=IGNORED)
    if context.documents_BS is None:
        return moved_BS
    # Numbers of documents never fall along a row: where the two are the same, so is all between them.
    same_BS = F.pad(context.documents_BS[:, k:] == context.documents_BS[:, :-k], (0, k), value=False)
    return torch.where(same_BS, moved_BS, IGNORED)
