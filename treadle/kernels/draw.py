"""The next token of each row of scores: the likeliest, or a draw that depends on a seed and a position alone.

A token is drawn by Gumbel's trick: the largest of score / temperature + g, with g = -log(-log(u)) and u a hash of the
seed, the position and the token. So no row matters to another, and every device draws the same.

R rows, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from treadle.kernels.operation import Floor, Operation, Shape, nbytes


def draw(logits_RV: Tensor, temperatures_R: Tensor, seeds_R: Tensor, positions_R: Tensor) -> tuple[Tensor, Tensor]:
    """-> tokens_R in int64, and their log probabilities at temperature 1, logp_R in float32

    temperatures_R: float32; 0 is the likeliest token, of equal ones the first. seeds_R, positions_R: int64.
    """
    args = logits_RV, temperatures_R, seeds_R, positions_R
    if DRAW.worthwhile(*args):
        return torch.ops.treadle.draw(*args)  # type: ignore[no-any-return]
    return _draw(*args)


def _draw(logits_RV: Tensor, temperatures_R: Tensor, seeds_R: Tensor, positions_R: Tensor) -> tuple[Tensor, Tensor]:
    z_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    greedy_R1 = temperatures_R[:, None] == 0
    noisy_RV = z_RV / torch.where(greedy_R1, 1.0, temperatures_R[:, None]) + gumbel(
        seeds_R, positions_R, z_RV.shape[1]
    ).to(z_RV.dtype)
    tokens_R = torch.where(greedy_R1, z_RV, noisy_RV).argmax(-1)
    return tokens_R, z_RV.gather(1, tokens_R[:, None])[:, 0] - z_RV.logsumexp(-1)


def gumbel(seeds_R: Tensor, positions_R: Tensor, vocabulary: int) -> Tensor:
    """What is added to each token's score.  -> float32 g_RV"""
    return -torch.log(-torch.log(uniform(seeds_R, positions_R, vocabulary)))


def uniform(seeds_R: Tensor, positions_R: Tensor, vocabulary: int) -> Tensor:
    """Numbers in (0, 1) for each token, from SplitMix64's finaliser (Steele et al. 2014).  -> float32 u_RV

    Integers wrap around in two's complement, so that every device computes the same.
    """
    token_V = torch.arange(vocabulary, device=seeds_R.device)
    start_R = _mix(_mix(seeds_R) + positions_R * -7046029254386353131)
    x_RV = _mix(start_R[:, None] + token_V * -7046029254386353131)
    return ((x_RV >> 41 & 0x7FFFFF).float() + 0.5) * 2**-23


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    R, V = shape
    temperatures = torch.rand(R, device=device) + 0.3
    temperatures[::2] = 0
    seeds = torch.randint(-(2**63), 2**63 - 1, (R,), device=device)
    return 3 * torch.randn(R, V, dtype=dtype, device=device), temperatures, seeds, torch.arange(R, device=device)


DRAW = Operation(
    name="draw",
    schema="(Tensor logits, Tensor temperatures, Tensor seeds, Tensor positions) -> (Tensor tokens, Tensor logp)",
    module=__name__,
    reference=_draw,
    fake=lambda x, temperatures, seeds, positions: (
        torch.empty_like(seeds),
        x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)),
    ),
    floor=lambda x, *rest: Floor(nbytes(x, *rest), 4 * x.numel()),
    arguments=_arguments,
    checked=((1, 7), (5, 300), (4, 20000)),
    timed=((16, 151936), (256, 151936)),
)
