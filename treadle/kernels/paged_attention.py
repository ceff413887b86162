"""Attention of many requests at once to keys and values in pages (Kwon et al. 2023, arXiv:2309.06180).

The new tokens of all requests are laid end to end. Each sees the tokens of its own request up to itself, which lie in
the pages that the request's row of a table names, in order.

R requests, T new tokens of all of them, N = R + 1, W pages of a row, H heads, G key-value heads, J keys of a request,
K head dim, V value dim.
"""

from typing import Any

import torch
from torch import Tensor

from treadle.kernels.operation import Floor, Operation, Shape, nbytes


@torch.compiler.disable  # it goes by what only the device knows
def _definition(
    q_THK: Tensor,
    keys: Tensor,
    values: Tensor | None,
    tables_RW: Tensor,
    lengths_R: Tensor,
    starts_N: Tensor,
    single: bool,
    value_dim: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    slopes_H: Tensor | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Request by request, in float32 or wider.  -> out_THV

    keys, values: [pages, tokens of a page, G, K or V]; values None: they are the first value_dim channels of the keys.
    tables_RW: int32, the pages of each request. lengths_R: int32, its tokens, new ones included; without any, its new
    tokens give zeros. starts_N: int32, where its new tokens begin in the row; at the end T. single: no request has
    more than one. window, scale, softcap, slopes, sinks: as `AttentionFacts` has them.
    """
    wide, G = torch.promote_types(q_THK.dtype, torch.float32), keys.shape[2]
    out_THV = q_THK.new_zeros(*q_THK.shape[:2], value_dim)
    values = keys[..., :value_dim] if values is None else values
    starts = starts_N.tolist()
    for pages_W, length, begin, end in zip(tables_RW, lengths_R.tolist(), starts, starts[1:], strict=False):
        if end == begin or not length:
            continue
        k_JGK, v_JGV = (buffer[pages_W].flatten(0, 1)[:length].to(wide) for buffer in (keys, values))
        q_SGEK = q_THK[begin:end].to(wide).unflatten(1, (G, -1))
        scores_GESJ = torch.einsum("sgek,jgk->gesj", q_SGEK, k_JGK) * scale
        place_J = torch.arange(length, device=q_THK.device)
        distance_SJ = place_J[length - (end - begin) :, None] - place_J
        if softcap is not None:
            scores_GESJ = softcap * torch.tanh(scores_GESJ / softcap)
        if slopes_H is not None:
            scores_GESJ = scores_GESJ - slopes_H.to(wide).view(G, -1, 1, 1) * distance_SJ
        hidden_SJ = (distance_SJ < 0) | (distance_SJ >= (length if window is None else window))
        scores_GESJ = scores_GESJ.masked_fill(hidden_SJ, float("-inf"))
        if sinks_H is not None:
            sinks_GES1 = sinks_H.to(wide).view(G, -1, 1, 1).expand(*scores_GESJ.shape[:3], 1)
            scores_GESJ = torch.cat((scores_GESJ, sinks_GES1), dim=-1)
        weights_GESJ = scores_GESJ.softmax(-1)[..., :length]
        out_THV[begin:end] = torch.einsum("gesj,jgv->sgev", weights_GESJ, v_JGV).flatten(1, 2)
    return out_THV


# R, new tokens of each, tokens of each (both at most, where new is negative), H, G, K, V or 0 for a part of the keys,
# page, window, softcap, ALiBi, sinks
CHECKED = (
    (3, 1, 40, 4, 4, 64, 64, 16, 0, 0, 0, 0),
    (5, -1, 150, 8, 2, 80, 80, 16, 37, 0, 0, 1),
    (2, 33, 90, 4, 2, 64, 64, 64, 0, 20, 0, 0),
    (4, -40, 100, 8, 1, 128, 128, 16, 0, 0, 1, 0),
    (3, -9, 70, 3, 1, 24, 24, 5, 20, 0, 0, 1),
    (3, -5, 80, 16, 1, 72, 64, 16, 0, 0, 0, 0),
)
TIMED = (
    (1, 1, 4096, 16, 8, 128, 128, 64, 0, 0, 0, 0),
    (32, 1, 1024, 16, 8, 128, 128, 64, 0, 0, 0, 0),
    (256, 1, 1024, 16, 8, 128, 128, 64, 0, 0, 0, 0),
    (64, 1, 4096, 32, 8, 128, 128, 64, 0, 0, 0, 0),
    (128, 1, 4096, 128, 1, 576, 512, 64, 0, 0, 0, 0),
    (8, 1024, 1024, 16, 8, 128, 128, 64, 0, 0, 0, 0),
)


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Pages in any order; what no token has filled, and page 0, are not numbers."""
    R, new, length, H, G, K, V, page, window, softcap, alibi, sinks = shape
    counts, lengths = [new] * R, [length] * R
    if new < 0:
        lengths = torch.randint(-new, length + 1, (R,)).tolist()
        counts = [1 + i % -new for i in range(R)]
    width = -(-max(lengths) // page)
    order = 1 + torch.randperm(R * width).view(R, width)
    buffers = [torch.randn(R * width + 1, page, G, size, dtype=dtype, device=device) for size in (K, V)]
    for buffer in buffers if new < 0 else []:
        buffer[0] = float("nan")
        for pages, last in zip(order, lengths, strict=True):
            places = (pages[:, None] * page + torch.arange(page)).flatten()[last:]
            buffer.flatten(0, 1)[places.to(device)] = float("nan")
    ints = (torch.tensor(x, dtype=torch.int32).to(device) for x in (lengths, [sum(counts[:i]) for i in range(R + 1)]))
    q = torch.randn(sum(counts), H, K, dtype=dtype, device=device)
    extra = (torch.rand(H, device=device) if wanted else None for wanted in (alibi, sinks))
    return (
        *(q, buffers[0], buffers[1] if K == V else None, order.to(device, torch.int32), *ints),
        *(max(counts) == 1, V, window or None, K**-0.5, float(softcap) or None, *extra),
    )


def _floor(q: Tensor, keys: Tensor, values: Any, tables: Tensor, lengths: Tensor, *rest: Any) -> Floor:
    """Of requests that fill their rows of the table: how many tokens they have only the device knows."""
    _, _, value_dim, window = rest[:4]
    (T, H, K), (R, width), (page, G) = q.shape, tables.shape, keys.shape[1:3]
    tokens, new = width * page, T / max(1, R)
    seen = tokens - (new - 1) / 2 if window is None else min(tokens, window)
    touched = tokens if window is None else min(tokens, window + new)
    kept = R * touched * G * (K if values is None else K + value_dim) * keys.element_size()
    return Floor(nbytes(q, tables) + nbytes(q) * value_dim / K + kept, 2 * T * H * seen * (K + value_dim))


PAGED_ATTENTION = Operation(
    name="paged_attention",
    schema="(Tensor q, Tensor keys, Tensor? values, Tensor tables, Tensor lengths, Tensor starts, bool single, "
    "int value_dim, int? window, float scale, float? softcap, Tensor? slopes, Tensor? sinks) -> Tensor",
    module=__name__,
    reference=_definition,
    fake=lambda q, keys, values, tables, lengths, starts, single, value_dim, *_: q.new_empty(*q.shape[:2], value_dim),
    floor=_floor,
    arguments=_arguments,
    checked=CHECKED,
    timed=TIMED,
    unmeasured=0,  # the definition waits for the device, and takes one request after the other
)
