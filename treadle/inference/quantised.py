"""Weights of 8 bits: half the memory of bf16, and matrix products in fp8 (Micikevicius et al. 2022, arXiv:2209.05433).

Each row of a weight, and each token's row of the activation, has one scale, which takes its largest absolute value to
the largest number of e4m3. Sums are in float32 and leave in the dtype of the activation.

N tokens, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.kernels.quantise import quantise_rows
from treadle.nn.latent_attention import LatentAttention
from treadle.nn.linear import Linear
from treadle.nn.roles import feature_matrices
from treadle.nn.transformer import Transformer
from treadle.parallel.float8 import UNIT, not_float8_because


class QuantisedLinear(Linear):
    """A `Linear` whose weight is in e4m3, with a scale for each of its rows."""

    scale_O: Tensor

    def take(self, weight_OI: Tensor) -> None:
        """Hold another weight, given as numbers of any dtype."""
        q_OI, scale_O = quantise_rows(weight_OI.detach())
        if self.weight.dtype == q_OI.dtype:  # where it is, as a captured step knows it there
            self.weight.copy_(q_OI)
            self.scale_O.copy_(scale_O)
        else:
            self.weight = nn.Parameter(q_OI, requires_grad=False)
            self.register_buffer("scale_O", scale_O, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x_NI, scale_N = quantise_rows(x.flatten(0, -2))
        y_NO = product(x_NI, scale_N, self.weight, self.scale_O, x.dtype).unflatten(0, x.shape[:-1])
        return y_NO if self.bias is None else y_NO + self.bias.to(x.dtype)


def product(x_NI: Tensor, scale_N: Tensor, weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T of numbers in e4m3 with scales for their rows; on a CPU, for which PyTorch 2.11 has none, by definition."""
    if x_NI.device.type == "cpu":
        return ((x_NI.float() * scale_N[:, None]) @ (weight_OI.float() * scale_O[:, None]).t()).to(dtype)
    scales: Any = {"scale_a": scale_N[:, None], "scale_b": scale_O[None], "use_fast_accum": True}
    return torch._scaled_mm(x_NI, weight_OI.t(), out_dtype=dtype, **scales)


def quantise(model: Transformer) -> int:
    """Hold in fp8 the weights of linear layers that map features to features, in place.  -> how many layers

    Not among them: embedding, head, gates of routers, experts, the projection that latent attention folds into its
    queries, what computes in float32, and matrices of sizes that are no multiples of 16.
    Raises ConfigError where fp8 cannot be had, or no layer is of these.
    """
    if reason := not_float8_because(model.device):
        raise ConfigError(f"quantise: {reason}; leave it out")
    if model.device.type == "cuda" and model.dtype != torch.bfloat16:
        raise ConfigError(
            f"quantise: products in fp8 come out in bf16, and the model is in {model.dtype}; use dtype bf16"
        )
    matrices = set(map(id, feature_matrices(model).values()))
    left = {inner for m in model.modules() if getattr(m, "full_precision", False) for inner in m.modules()}
    left |= {m.kv_up for m in model.modules() if isinstance(m, LatentAttention)}
    layers = [m for m in model.modules() if type(m) is Linear and id(m.weight) in matrices and m not in left]
    layers = [layer for layer in layers if not any(size % UNIT for size in layer.weight.shape)]
    if not layers:
        raise ConfigError(
            f"quantise: no linear layer of this model has sizes that are multiples of {UNIT}; leave it out"
        )
    for layer in layers:
        layer.__class__ = QuantisedLinear
        layer.take(layer.weight)  # type: ignore[operator]
    return len(layers)
