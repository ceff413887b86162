"""Feed-forward layers: dense, and gated (SwiGLU, GeGLU, ReGLU; Shazeer 2020, arXiv:2002.05202).

B batch, S sequence, D model dim, F feed-forward dim.
"""

from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from treadle.kernels.gates import Activation, GatedActivation, activate, gated_activation
from treadle.nn.config import FeedForwardConfig
from treadle.nn.linear import Linear


class DenseConfig(FeedForwardConfig):
    """Two matrices with an activation between them."""

    kind: Literal["dense"] = "dense"
    dim: PositiveInt = Field(description="width of the hidden layer")
    activation: Activation = Field("gelu", description="the elementwise function")
    bias: bool = Field(False, description="bias on both matrices")


class Dense(nn.Module):
    """down(act(up(x))).  x_BSD -> y_BSD"""

    roles = {"up": "column", "down": "row"}
    entry, exit = "up", "down"

    def __init__(self, config: DenseConfig, model_dim: int):
        super().__init__()
        self.activation = config.activation
        self.up = Linear(model_dim, config.dim, bias=config.bias)
        self.down = Linear(config.dim, model_dim, bias=config.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(activate(self.up(x_BSD), self.activation))


class GatedConfig(FeedForwardConfig):
    """A gate beside the hidden layer: `silu` is SwiGLU, `gelu` GeGLU, `relu` ReGLU, `sigmoid` the original GLU."""

    kind: Literal["gated"] = "gated"
    dim: PositiveInt = Field(description="width of the hidden layer")
    activation: GatedActivation = Field("silu", description="the gate's elementwise function")
    bias: bool = Field(False, description="bias on all matrices")


class Gated(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up stored as one matrix.  x_BSD -> y_BSD"""

    roles = {"gate_up": "column", "down": "row"}
    entry, exit = "gate_up", "down"

    def __init__(self, config: GatedConfig, model_dim: int):
        super().__init__()
        self.activation = config.activation
        self.gate_up = Linear(model_dim, 2 * config.dim, bias=config.bias, parts=("gate", "up"))
        self.down = Linear(config.dim, model_dim, bias=config.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(gated_activation(self.gate_up(x_BSD), self.activation))
