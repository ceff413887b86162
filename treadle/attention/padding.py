"""Values of another size than queries and keys, for kernels that want one size.

B batch, S query length, T key length, H heads, G key-value heads, K query and key dim, V value dim, P the larger.
"""

import torch.nn.functional as F
from torch import Tensor


def one_dim(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the smaller up with zeros, which change no score, and no output but for zeros behind its first V.

    The kernel must be told the scale, as its own would be that of P channels.  -> q_BSHP, k_BTGP, v_BTGP
    """
    P = max(q_BSHK.shape[-1], v_BTGV.shape[-1])
    return _filled(q_BSHK, P), _filled(k_BTGK, P), _filled(v_BTGV, P)


def _filled(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))
