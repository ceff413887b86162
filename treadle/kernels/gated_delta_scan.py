"""How the gated delta rule's state goes from chunk to chunk: the part of its chunked form that is a loop.

    changes_n = values_n - keys_n S_n        S_n+1 = passing_n S_n + leaving_n changes_n

An operator of our own, with its backward: a compiler would unroll the loop, and take minutes over a long row's chunks.

Z batch times value heads, N chunks, C tokens of a chunk, K key dim, V value dim.
"""

from typing import Any

import torch
from torch import Tensor


def gated_delta_scan(
    values_ZNCV: Tensor, keys_ZNCK: Tensor, leaving_ZNKC: Tensor, passing_ZN11: Tensor, state_ZKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The state before each chunk, the changes of each, the state after the last: before_ZNKV, changes_ZNCV, state_ZKV.

    All of one float dtype, and at least one chunk. Can be differentiated once.
    """
    return torch.ops.treadle.gated_delta_scan(  # type: ignore[no-any-return]
        values_ZNCV, keys_ZNCK, leaving_ZNKC, passing_ZN11, state_ZKV
    )


@torch.library.custom_op("treadle::gated_delta_scan", mutates_args=())
def _forward(
    values_ZNCV: Tensor, keys_ZNCK: Tensor, leaving_ZNKC: Tensor, passing_ZN11: Tensor, state_ZKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    before_ZNKV = state_ZKV.new_empty(state_ZKV.shape[0], values_ZNCV.shape[1], *state_ZKV.shape[1:])
    changes_ZNCV = values_ZNCV.new_empty(values_ZNCV.shape)
    for n in range(values_ZNCV.shape[1]):
        before_ZNKV[:, n] = state_ZKV
        changes_ZCV = torch.baddbmm(values_ZNCV[:, n], keys_ZNCK[:, n], state_ZKV, alpha=-1)
        changes_ZNCV[:, n] = changes_ZCV
        state_ZKV = torch.baddbmm(passing_ZN11[:, n] * state_ZKV, leaving_ZNKC[:, n], changes_ZCV)
    return before_ZNKV, changes_ZNCV, state_ZKV


@torch.library.custom_op("treadle::gated_delta_scan_backward", mutates_args=())
def _reverse(
    dbefore_ZNKV: Tensor,
    dchanges_ZNCV: Tensor,
    dstate_ZKV: Tensor,
    keys_ZNCK: Tensor,
    leaving_ZNKC: Tensor,
    passing_ZN11: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the values (with all that follows from them), of the state after each chunk, of the first."""
    dvalues_ZNCV = dchanges_ZNCV.new_empty(dchanges_ZNCV.shape)
    dafter_ZNKV = dbefore_ZNKV.new_empty(dbefore_ZNKV.shape)
    dstate_ZKV = dstate_ZKV.clone()
    for n in reversed(range(dvalues_ZNCV.shape[1])):
        dafter_ZNKV[:, n] = dstate_ZKV
        dvalues_ZCV = torch.baddbmm(dchanges_ZNCV[:, n], leaving_ZNKC[:, n].mT, dstate_ZKV)
        dvalues_ZNCV[:, n] = dvalues_ZCV
        passed_ZKV = dbefore_ZNKV[:, n] + passing_ZN11[:, n] * dstate_ZKV
        dstate_ZKV = torch.baddbmm(passed_ZKV, keys_ZNCK[:, n].mT, dvalues_ZCV, alpha=-1)
    return dvalues_ZNCV, dafter_ZNKV, dstate_ZKV


@_forward.register_fake
def _(
    values_ZNCV: Tensor, keys_ZNCK: Tensor, leaving_ZNKC: Tensor, passing_ZN11: Tensor, state_ZKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    before_ZNKV = state_ZKV.new_empty(state_ZKV.shape[0], values_ZNCV.shape[1], *state_ZKV.shape[1:])
    return before_ZNKV, values_ZNCV.new_empty(values_ZNCV.shape), state_ZKV.new_empty(state_ZKV.shape)


@_reverse.register_fake
def _(dbefore_ZNKV: Tensor, dchanges_ZNCV: Tensor, dstate_ZKV: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (dchanges_ZNCV, dbefore_ZNKV, dstate_ZKV))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:4], *output[:2])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    keys_ZNCK, leaving_ZNKC, passing_ZN11, before_ZNKV, changes_ZNCV = ctx.saved_tensors
    dvalues_ZNCV, dafter_ZNKV, dstate_ZKV = torch.ops.treadle.gated_delta_scan_backward(
        *grads, keys_ZNCK, leaving_ZNKC, passing_ZN11
    )
    dkeys_ZNCK = -(dvalues_ZNCV @ before_ZNKV.mT)
    dleaving_ZNKC = dafter_ZNKV @ changes_ZNCV.mT
    dpassing_ZN11 = (dafter_ZNKV * before_ZNKV).sum((-2, -1), keepdim=True)
    return dvalues_ZNCV, dkeys_ZNCK, dleaving_ZNKC, dpassing_ZN11, dstate_ZKV


_forward.register_autograd(_backward, setup_context=_save)
