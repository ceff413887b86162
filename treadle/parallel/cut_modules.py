"""What modules that are cut do otherwise than whole ones: each is mixed into the class of a module that is.

A mix-in comes before the module's own class, so that `super()` here is the module's own code. `peers` are the processes
that share it.

B batch, S sequence, D model dim, V vocabulary, H this process's heads, K head dim.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.attention import AttentionContext
from treadle.nn.norm import LayerNorm, RMSNorm
from treadle.parallel.collectives import (
    SEQUENCE,
    Copied,
    Gathered,
    Peers,
    enter,
    gather_linear,
    leave,
    linear_scatter,
    total,
)
from treadle.parallel.vocabulary import vocabulary_cross_entropy


class Cut(nn.Module):
    peers: Peers


class BlockEntry(Cut):
    def forward(self, x_BSD: Tensor, *arguments: Any) -> Tensor:
        return super().forward(enter(x_BSD, self.peers), *arguments)  # type: ignore[misc,no-any-return]


class BlockExit(Cut):
    def forward(self, x_BSD: Tensor, *arguments: Any) -> Tensor:
        return leave(super().forward(x_BSD, *arguments), self.peers)  # type: ignore[misc]


class BlockEnds(Cut):
    def forward(self, x_BSD: Tensor, *arguments: Any) -> Tensor:
        return leave(super().forward(enter(x_BSD, self.peers), *arguments), self.peers)  # type: ignore[misc]


def block_form(*, enters: bool, leaves: bool) -> type | None:
    """For a block that is not entered, or not left, by a Linear that it names."""
    return {(True, True): BlockEnds, (True, False): BlockEntry, (False, True): BlockExit}.get((enters, leaves))


class EntryLinear(Cut):
    bias: Tensor | None
    product: Callable[..., Tensor]

    def forward(self, x_BSI: Tensor) -> Tensor:
        if not self.peers.fused:
            return super().forward(enter(x_BSI, self.peers))  # type: ignore[misc,no-any-return]
        return _biased(self.product(x_BSI, partial(gather_linear, self.peers)), self.bias)


class ExitLinear(Cut):
    """The bias is added to the sum."""

    bias: Tensor | None
    product: Callable[..., Tensor]

    def forward(self, x_BSI: Tensor) -> Tensor:
        if not self.peers.fused:
            return _biased(leave(self.product(x_BSI), self.peers), self.bias)
        return _biased(self.product(x_BSI, partial(linear_scatter, self.peers)), self.bias)


def _biased(y_BSO: Tensor, bias_O: Tensor | None) -> Tensor:
    return y_BSO if bias_O is None else y_BSO + bias_O.to(y_BSO.dtype)


class CutEmbedding(Cut):
    """Each process looks up the tokens that it has vectors for."""

    weight: Any

    def forward(self, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
        weight_VD = self.weight
        here_BS = tokens_BS - self.peers.rank * weight_VD.shape[0]
        known_BS1 = ((here_BS >= 0) & (here_BS < weight_VD.shape[0]))[..., None]
        x_BSD = F.embedding(here_BS.clamp(0, weight_VD.shape[0] - 1), weight_VD).to(dtype)
        return leave(x_BSD * known_BS1, self.peers)


class CutHead(Cut):
    """Each process has the scores of some of the vocabulary; what is returned is whole, and the same on all."""

    weight: Any
    softcap: float | None
    _scaled: Callable[[Tensor], Tensor]

    def forward(self, x_BSD: Tensor) -> Tensor:
        logits_BSV = super().forward(Copied.apply(x_BSD, self.peers))  # type: ignore[misc]
        return Gathered.apply(logits_BSV, logits_BSV.ndim - 1, self.peers)  # type: ignore[no-any-return]

    def penalised_cross_entropy(
        self, x_BSD: Tensor, targets_BS: Tensor, *, z_loss: float = 0.0, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        tokens_TD, targets_T = self._scaled(Copied.apply(x_BSD, self.peers)).flatten(0, 1), targets_BS.flatten()
        options: dict[str, Any] = {"softcap": self.softcap, "z_loss": z_loss, "smoothing": smoothing}
        return vocabulary_cross_entropy(tokens_TD, self.weight, targets_T, self.peers, **options)


class CutPosition(Cut):
    """A vector per position, of the positions that are here."""

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Tensor:
        if self.peers.cut:
            positions_BS = self.peers.share(positions_BS, SEQUENCE)
        return super().forward(positions_BS, dtype)  # type: ignore[misc,no-any-return]


def whole_sequence(x_BSD: Tensor, peers: Peers) -> Tensor:
    return Gathered.apply(x_BSD, SEQUENCE, peers) if peers.cut else x_BSD  # type: ignore[no-any-return]


class CutTransformer(Cut):
    """What comes out of it is whole, and the same on all processes: losses need not know how it was made."""

    last: str

    def segment(
        self, x_BSD: Tensor | None, tokens_BS: Tensor, context: AttentionContext, layers: Collection[str]
    ) -> Tensor:
        peers, length = self.peers, tokens_BS.shape[1]
        peers.cut = stream_length(self, tokens_BS, context) < length
        if not peers.cut and torch.is_grad_enabled():
            raise ValueError(
                f"{peers.size} processes cannot share sequences of {length} tokens, and with a gradient they have to; "
                f"use multiples of parallel.tensor={peers.size}, and no cache"
            )
        x_BSD = super().segment(x_BSD, tokens_BS, context, layers)  # type: ignore[misc]
        return whole_sequence(x_BSD, peers) if self.last in layers else x_BSD


def stream_length(model: nn.Module, tokens_BS: Tensor, context: AttentionContext | None = None) -> int:
    """How many of a row's tokens the residual stream has between layers on this process."""
    length: int = tokens_BS.shape[1]
    if not isinstance(model, CutTransformer) or (context is not None and context.cache is not None):
        return length
    return length if length % model.peers.size else length // model.peers.size


class CutMultiToken(Cut):
    """Its masks are of whole rows: what is embedded is put at its place in the row, and `CutMultiTokenModule` takes it
    out again."""

    def forward(
        self, x_BSD: Tensor, tokens_BS: Tensor, context: AttentionContext, embed: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        peers = self.peers
        if not peers.cut:
            return super().forward(x_BSD, tokens_BS, context, embed)  # type: ignore[misc,no-any-return]

        def placed(tokens_BS: Tensor) -> Tensor:
            here_BSD = embed(tokens_BS)
            before, length = peers.rank * here_BSD.shape[1], here_BSD.shape[1] * peers.size
            return F.pad(here_BSD, (0, 0, before, length - before - here_BSD.shape[1]))

        found = super().forward(peers.share(x_BSD, SEQUENCE), tokens_BS, context, placed)  # type: ignore[misc]
        return [whole_sequence(further_BSD, peers) for further_BSD in found]


class CutMultiTokenModule(Cut):
    def forward(self, x_BSD: Tensor, embedding_BSD: Tensor, context: AttentionContext) -> Tensor:
        if self.peers.cut:
            embedding_BSD = self.peers.share(embedding_BSD, SEQUENCE)
        return super().forward(x_BSD, embedding_BSD, context)  # type: ignore[misc,no-any-return]


class WideRMSNorm(Cut):
    """A norm over the heads of all processes as one vector.

    Where heads are shared they count as often as they are there, in the sum and in the number of summands.
    """

    weight: Any
    eps: float
    offset: float

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = total(wide.square().sum(-1, keepdim=True), self.peers) / (x.shape[-1] * self.peers.size)
        return (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * (self.weight + self.offset).to(x.dtype)


class WideLayerNorm(Cut):
    """The same with a mean that is taken off."""

    weight: Any
    bias: Any
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        wide, count = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1] * self.peers.size
        wide = wide - total(wide.sum(-1, keepdim=True), self.peers) / count
        variance = total(wide.square().sum(-1, keepdim=True), self.peers) / count
        y = (wide * torch.rsqrt(variance + self.eps)).to(x.dtype)
        y = y if self.weight is None else y * self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def wide_norm(norm: nn.Module) -> type:
    """For a norm over all heads. Raises ValueError for one of another kind."""
    for kind, form in ((RMSNorm, WideRMSNorm), (LayerNorm, WideLayerNorm)):
        if isinstance(norm, kind):
            return form
    raise ValueError(f"{type(norm).__name__} over all heads cannot be cut; use a norm of each head, or rms or layer")
