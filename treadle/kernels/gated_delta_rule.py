"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464): a matrix per head that maps keys to values, as a state.

With a decay a, a writing strength b, and a state S of K x V numbers that starts at zero,

    S_t = a_t S_t-1 + b_t k_t (v_t - k_t^T a_t S_t-1)^T        y_t = q_t^T S_t

each token lets the state fade, corrects what the state holds under its key towards its value, and reads. `recurrent` is
this definition. `chunked` computes the same for C tokens at once: written out, the corrections w_i of a chunk solve the
unit lower triangular system

    w_i + sum_j<i  b_i (k_i . k_j) a_j+1...a_i w_j  =  b_i (v_i - a_1...a_i k_i^T S)

whose right side is linear in the state S before the chunk. So its two parts are solved for all chunks side by side (the
WY form), and only S_next = a_1...a_C S + sum_j a_j+1...a_C k_j w_j^T goes from chunk to chunk.

B batch, S sequence, H query and key heads, G value heads, R = G / H of them to a key head, K key dim, V value dim,
N chunks, C tokens of a chunk (I, J where two of them meet), Z = B times G.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels.gated_delta_scan import gated_delta_scan

CHUNK = 64


def gated_delta_rule(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSGV: Tensor,
    log_decay_BSG: Tensor,
    beta_BSG: Tensor,
    starts_BS: Tensor,
    state_BGKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What each token reads, and the state after the last one.  -> y_BSGV, state_BGKV

    All float tensors in one dtype, float32 or wider: it is the dtype of the state.
    q_BSHK, k_BSHK: value heads h*R ... h*R + R-1 share the query and key head h. Keys are of length one at most, or
        the state may grow without bound; queries come scaled.
    log_decay_BSG: at most 0, -inf included. beta_BSG: in 0 ... 1.
    starts_BS: bool, the first tokens of documents. They find a state of zero, whatever came before.
    state_BGKV: of the tokens before; None is zero.
    Raises ValueError for heads that do not divide, and for narrower dtypes.
    """
    if v_BSGV.shape[2] % k_BSHK.shape[2]:
        raise ValueError(f"{k_BSHK.shape[2]} key heads do not divide {v_BSGV.shape[2]} value heads")
    if torch.finfo(v_BSGV.dtype).bits < 32:
        raise ValueError(f"the state would be kept in {v_BSGV.dtype}; cast the arguments to float32")
    if state_BGKV is None:
        state_BGKV = v_BSGV.new_zeros(v_BSGV.shape[0], v_BSGV.shape[2], k_BSHK.shape[3], v_BSGV.shape[3])
    form = recurrent if q_BSHK.shape[1] == 1 else chunked
    return form(q_BSHK, k_BSHK, v_BSGV, log_decay_BSG, beta_BSG, starts_BS, state_BGKV)


def recurrent(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSGV: Tensor,
    log_decay_BSG: Tensor,
    beta_BSG: Tensor,
    starts_BS: Tensor,
    state_BGKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    shared = v_BSGV.shape[2] // k_BSHK.shape[2]
    q_BSGK, k_BSGK = (x.repeat_interleave(shared, dim=2) for x in (q_BSHK, k_BSHK))
    decay_BSG = log_decay_BSG.exp().masked_fill(starts_BS[:, :, None], 0)
    read = []
    for t in range(q_BSHK.shape[1]):
        state_BGKV = state_BGKV * decay_BSG[:, t, :, None, None]
        held_BGV = torch.einsum("bgk,bgkv->bgv", k_BSGK[:, t], state_BGKV)
        change_BGV = beta_BSG[:, t, :, None] * (v_BSGV[:, t] - held_BGV)
        state_BGKV = state_BGKV + k_BSGK[:, t, :, :, None] * change_BGV[:, :, None, :]
        read.append(torch.einsum("bgk,bgkv->bgv", q_BSGK[:, t], state_BGKV))
    return torch.stack(read, dim=1), state_BGKV


def chunked(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSGV: Tensor,
    log_decay_BSG: Tensor,
    beta_BSG: Tensor,
    starts_BS: Tensor,
    state_BGKV: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same, `chunk` tokens at a time. Tensors named without R have a dimension of one there."""
    length, heads = q_BSHK.shape[1:3]
    chunk = min(chunk, length)
    shape = (heads, v_BSGV.shape[2] // heads)
    q_BHNCK, k_BHNCK = (_in_chunks(x[:, :, :, None], chunk) for x in (q_BSHK, k_BSHK))
    v_BHRNCV = _in_chunks(v_BSGV.unflatten(2, shape), chunk)
    log_BHRNC1, beta_BHRNC1 = (_in_chunks(x.unflatten(2, shape)[..., None], chunk) for x in (log_decay_BSG, beta_BSG))
    starts_BNC = _in_chunks(starts_BS[:, :, None, None, None], chunk)[:, :, :, :, :, 0]
    into_BHRNC1, between_BHRNIJ = _decays(log_BHRNC1, starts_BNC)

    kk_BHRNIJ = beta_BHRNC1 * (k_BHNCK @ k_BHNCK.mT) * between_BHRNIJ
    sides = torch.cat((beta_BHRNC1 * v_BHRNCV, beta_BHRNC1 * into_BHRNC1 * k_BHNCK), dim=-1)
    # The diagonal and what is above are not read. Powers of the matrix in place of the solution would overflow where
    # keys repeat; substitution does not.
    solved = torch.linalg.solve_triangular(kk_BHRNIJ, sides, upper=False, unitriangular=True)
    values_BHRNCV, keys_BHRNCK = solved.split((v_BHRNCV.shape[-1], k_BHNCK.shape[-1]), dim=-1)

    leaving_BHRNKC = (k_BHNCK * between_BHRNIJ[..., -1, :, None]).mT
    passing_BHRN11 = into_BHRNC1[..., -1:, :]
    before_ZNKV, changes_ZNCV, state_ZKV = gated_delta_scan(
        values_BHRNCV.flatten(0, 2),
        keys_BHRNCK.flatten(0, 2),
        leaving_BHRNKC.flatten(0, 2),
        passing_BHRN11.flatten(0, 2),
        state_BGKV.flatten(0, 1),
    )
    before_BHRNKV, changes_BHRNCV = (x.unflatten(0, values_BHRNCV.shape[:3]) for x in (before_ZNKV, changes_ZNCV))

    qk_BHRNIJ = (q_BHNCK @ k_BHNCK.mT) * between_BHRNIJ
    y_BHRNCV = (into_BHRNC1 * q_BHNCK) @ before_BHRNKV + qk_BHRNIJ @ changes_BHRNCV
    y_BSGV = y_BHRNCV.permute(0, 3, 4, 1, 2, 5).flatten(3, 4).flatten(1, 2)[:, :length]
    return y_BSGV, state_ZKV.view_as(state_BGKV)


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, S, H, R, *] -> [B, H, R, N, C, *]; zeros fill the last chunk, and a token of zeros changes no state."""
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 4, 1, 2, 5)


def _decays(log_BHRNC1: Tensor, starts_BNC: Tensor) -> tuple[Tensor, Tensor]:
    """What is left, at each token, of the state before its chunk; and at token I of what token J wrote.

    Zero across the start of a document. -> into_BHRNC1, between_BHRNIJ
    """
    chunk = log_BHRNC1.shape[-2]
    document_BNC = starts_BNC.cumsum(-1)
    into_BHRNC1 = log_BHRNC1.cumsum(-2).masked_fill((document_BNC != 0)[..., None], float("-inf")).exp()
    earlier_IJ = torch.ones(chunk, chunk, dtype=torch.bool, device=log_BHRNC1.device).tril()
    # Each sum is formed by itself: the difference of two sums from the chunk's start would lose what a strong decay
    # before J leaves no digits for. Masked before exp, which above the diagonal would overflow.
    between_BHRNIJ = log_BHRNC1.masked_fill(~earlier_IJ.tril(-1), 0).cumsum(-2)
    seen_BNIJ = earlier_IJ & (document_BNC[..., :, None] == document_BNC[..., None, :])
    return into_BHRNC1, between_BHRNIJ.masked_fill(~seen_BNIJ, float("-inf")).exp()
