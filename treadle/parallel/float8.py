"""fp8 training: the matmuls of linear layers take 8-bit operands, forward and backward (Micikevicius et al. 2022,
arXiv:2209.05433).

    y  = x W^T     e4m3 x e4m3
    dx = dy W      e5m2 x e4m3
    dW = dy^T x    e5m2 x e4m3

Each operand has one scale, which takes its largest absolute value to the largest number of the format, found anew each
time. Products are summed in float32 and leave in the dtype of x; weights, their gradients and everything else stay what
they are. Applied from outside, like all that is parallel, and it goes together with that:

    sharded data        weights are gathered in bf16, and each process finds the scale of the whole: nothing is sent
    tensor parallelism  the scale is that of the whole matrix or activation, its maximum taken over the processes
    recomputation       gives the same numbers; `selective` counts these matmuls as it does others
    zero bubble         the gradient of a weight waits with its two operands in 8 bits

N rows (of all leading dimensions), I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, autograd, nn

from treadle.errors import ConfigError
from treadle.nn.linear import Linear
from treadle.nn.roles import feature_matrices
from treadle.nn.transformer import Transformer
from treadle.parallel.collectives import Peers
from treadle.parallel.config import ParallelConfig
from treadle.parallel.mesh import Mesh
from treadle.parallel.weight_gradients import DeferringLinear, Total, apart

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
UNIT = 16  # the sizes of a matrix have to be multiples of it


def use_float8(model: Transformer, mesh: Mesh, config: ParallelConfig) -> None:
    """Let linear layers that map features to features multiply in fp8. Swapped in place; names and weights stay.

    Not among them: embedding, head, the gates of routers, experts, and what computes in float32. A layer of which this
    process's part has a size that is no multiple of 16 goes on in the compute dtype.
    Comes before sharding, and after weight gradients were deferred. Raises ConfigError where fp8 cannot be had.
    """
    if reason := not_float8_because(mesh.device):
        raise ConfigError(f"training.fp8: {reason}; set it to false")
    if config.async_tensor:
        raise ConfigError("training.fp8: it does not go together with parallel.async_tensor; leave one of them out")
    forms: dict[type[nn.Module], type[nn.Module]] = {Linear: Float8Linear, DeferringLinear: Float8DeferringLinear}
    matrices = set(map(id, feature_matrices(model).values()))
    wide = {inner for m in model.modules() if getattr(m, "full_precision", False) for inner in m.modules()}
    layers: list[Any] = [m for m in model.modules() if type(m) in forms and id(m.weight) in matrices and m not in wide]
    if mesh.pipeline is None and not any(_fits(layer.weight) for layer in layers):
        raise ConfigError(
            f"training.fp8: no linear layer of this model has sizes that are multiples of {UNIT}; set it to false"
        )
    for layer in layers:
        layer.__class__ = forms[type(layer)]


def not_float8_because(device: torch.device) -> str | None:
    """Why a device has no such matmuls; None if it has, as a CPU does, slowly."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU, or a CPU to try it on, and this is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and fp8 needs 8.9 (Ada, Hopper)"
    )


class Float8Linear(Linear):
    peers: Peers | None = None  # the processes that share its matrix

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def product(self, x: Tensor, multiply: Callable[..., Tensor] | None = None) -> Tensor:
        if not _fits(self.weight):
            return super().product(x)
        y: Tensor = _Product.apply(x, self.weight.to(x.dtype), self.peers and self.peers.name, None)
        return y


class Float8DeferringLinear(DeferringLinear):
    peers: Peers | None = None

    @torch.compiler.disable
    def product(self, x: Tensor, multiply: Callable[..., Tensor] | None = None) -> Tensor:
        if not _fits(self.weight):
            return super().product(x)
        total = Total(self)

        def later(*operands: Any) -> None:
            self.queue.waiting.append(lambda: total.add(lambda sum_OI: sum_OI.add_(outer_products(*operands))))

        y: Tensor = _Product.apply(x, apart(self.weight), self.peers and self.peers.name, later)
        return y


def _fits(weight: Tensor) -> bool:
    return not any(size % UNIT for size in weight.shape)


class _Product(autograd.Function):
    """x W^T, in fp8 as above.  group: processes over which scales are taken. later: takes what a weight's gradient is
    made of, which is otherwise formed in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, group: Any, later: Any) -> Tensor:
        x_NI, narrow_OI = x.flatten(0, -2), weight_OI.to(x.dtype)
        x_scale, weight_scale = scales([x_NI, narrow_OI], FORWARD, group)
        x8_NI, weight8_OI = quantised(x_NI, x_scale, FORWARD), quantised(narrow_OI, weight_scale, FORWARD)
        y_NO = torch._scaled_mm(x8_NI, weight8_OI.t(), x_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True)
        # Of the weight only its scale is kept: gathered weights are freed after the forward, and come again.
        ctx.save_for_backward(x8_NI, x_scale, weight_OI, weight_scale)
        ctx.group, ctx.later = group, later
        return y_NO.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy,), (x8_NI, x_scale, weight_OI, weight_scale) = grads, ctx.saved_tensors
        dy_NO = dy.flatten(0, -2)
        (dy_scale,) = scales([dy_NO], BACKWARD, ctx.group)
        dy8_NO = quantised(dy_NO, dy_scale, BACKWARD)
        dx = dweight_OI = None
        if ctx.needs_input_grad[0]:
            weight8_IO = quantised(weight_OI.to(dy.dtype), weight_scale, FORWARD).t().contiguous()
            dx_NI = torch._scaled_mm(dy8_NO, weight8_IO.t(), dy_scale, weight_scale, out_dtype=dy.dtype)
            dx = dx_NI.unflatten(0, dy.shape[:-1])
        if ctx.needs_input_grad[1]:
            operands = (dy8_NO, x8_NI, dy_scale, x_scale, dy.dtype)
            if ctx.later is None:
                dweight_OI = outer_products(*operands)
            else:
                ctx.later(*operands)
        return dx, dweight_OI, None, None


def scales(tensors: list[Tensor], dtype: torch.dtype, group: Any = None) -> list[Tensor]:
    """What each tensor is divided by to fill the range of an fp8 dtype, float32 scalars, the same for a whole group.

    Not finite where the tensor is not, and so is then all that comes of it.
    """
    largest = [tensor.abs().amax().float() for tensor in tensors]
    if group is not None:
        largest = [*funcol.wait_tensor(funcol.all_reduce(torch.stack(largest), "max", group)).unbind()]
    smallest = torch.finfo(torch.float32).tiny  # of a tensor of zeros
    return [(each / torch.finfo(dtype).max).clamp(min=smallest) for each in largest]


def quantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max  # rounding of the scale may lead past it, where these formats have no number
    return (x.float() * scale.reciprocal()).clamp(-largest, largest).to(dtype)


def outer_products(dy8_NO: Tensor, x8_NI: Tensor, dy_scale: Tensor, x_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x. Both have to lie along N, which has to be a multiple of 16 too: zeros are appended."""
    missing = -dy8_NO.shape[0] % UNIT
    dy8_ON, x8_IN = (_padded(tensor.t(), missing).contiguous() for tensor in (dy8_NO, x8_NI))
    return torch._scaled_mm(dy8_ON, x8_IN.t(), dy_scale, x_scale, out_dtype=dtype)


def _padded(tensor8: Tensor, missing: int) -> Tensor:
    # As bytes, since few operations know these dtypes; a byte of zeros is a zero.
    if not missing:
        return tensor8
    return nn.functional.pad(tensor8.view(torch.uint8), (0, missing)).view(tensor8.dtype)
