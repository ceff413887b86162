"""The log probability of one token out of each row of logits: what policy gradients need, without a second such matrix.

T rows, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, autograd

from treadle.kernels.operation import Floor, Gradient, Operation, Shape, nbytes


def log_probabilities(logits_TV: Tensor, tokens_T: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token], in float32.  -> logp_T

    tokens_T: int64; a negative one (of padding) has log probability and gradient zero.
    """
    if LOG_PROBABILITIES.worthwhile(logits_TV, tokens_T, temperature):
        return _LogProbabilities.apply(logits_TV, tokens_T, temperature)  # type: ignore[no-any-return]
    return _log_probabilities(logits_TV, tokens_T, temperature)


def _log_probabilities(logits_TV: Tensor, tokens_T: Tensor, temperature: float) -> Tensor:
    z_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)) / temperature
    picked_T = z_TV.gather(1, tokens_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(tokens_T >= 0, picked_T - z_TV.logsumexp(-1), 0.0)


class _LogProbabilities(autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, tokens_T: Tensor, temperature: float) -> Tensor:
        logp_T, lse_T = torch.ops.treadle.log_probabilities(logits_TV, tokens_T, temperature)
        ctx.save_for_backward(logits_TV, tokens_T, lse_T)
        ctx.temperature = temperature
        return logp_T  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return torch.ops.treadle.log_probabilities_backward(grads[0], *saved, ctx.temperature), None, None


def _lse(logits_TV: Tensor, temperature: float) -> Tensor:
    return (logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)) / temperature).logsumexp(-1)


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    T, V = shape
    return 3 * torch.randn(T, V, dtype=dtype, device=device), torch.randint(-1, V, (T,), device=device), 0.7


def _backward_arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    logits, tokens, temperature = _arguments(shape, dtype, device)
    return torch.randn(shape[0], device=device), logits, tokens, _lse(logits, temperature), temperature


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


CHECKED = ((1, 7), (5, 300), (3, 9000))
TIMED = ((8192, 32768), (4096, 128256))

LOG_PROBABILITIES = Operation(
    name="log_probabilities",
    schema="(Tensor logits, Tensor tokens, float temperature) -> (Tensor logp, Tensor lse)",
    module=__name__,
    reference=lambda x, tokens, temperature: (_log_probabilities(x, tokens, temperature), _lse(x, temperature)),
    plain=_log_probabilities,
    fake=_fake,
    floor=lambda x, tokens, temperature: Floor(nbytes(x, tokens, tokens), 4 * x.numel()),
    arguments=_arguments,
    checked=CHECKED,
    timed=TIMED,
)

Operation(
    name="log_probabilities_backward",
    schema="(Tensor dlogp, Tensor logits, Tensor tokens, Tensor lse, float temperature) -> Tensor",
    module=__name__,
    reference=Gradient(lambda dy, x, tokens, lse, t: (lambda x: _log_probabilities(x, tokens, t), (x,), dy)),
    fake=lambda dlogp, logits, *_: logits.new_empty(logits.shape),
    floor=lambda dlogp, x, tokens, lse, t: Floor(nbytes(x, x, tokens, dlogp, lse), 4 * x.numel()),
    arguments=_backward_arguments,
    checked=CHECKED,
    timed=TIMED,
)
