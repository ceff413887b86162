"""What planning answers with, whichever engine computed it: memory by category, time by cause.

All memory is in bytes of one process's device, all time in seconds of one step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Footprint:
    """Device memory of one process at the moment of its peak."""

    parameters: float = 0.0  # this process's shards of the master weights, and buffers
    gradients: float = 0.0  # of those parameters, in the dtype in which they are summed
    optimizer: float = 0.0  # state: AdamW's two moments, Muon's one
    activations: float = 0.0  # kept from the forward for the backward, and what a layer needs while it runs
    loss: float = 0.0  # scores, probabilities and gradients of the head and the cross entropy
    communication: float = 0.0  # gathered weights, unreduced gradients, receive buffers
    workspace: float = 0.0  # of matmul, attention and optimizer kernels
    overhead: float = 0.0  # CUDA context, NCCL, the allocator's rounding: measured once for a kind of device

    @property
    def total(self) -> float:
        return sum(amount for _, amount in self)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return ((each.name, getattr(self, each.name)) for each in fields(self))


@dataclass(frozen=True)
class StepTime:
    """Where one step's time goes. What overlaps with computation is not in `communication` but in `hidden`."""

    compute: float = 0.0  # matmuls and attention, at the rate that the device reaches on them
    memory: float = 0.0  # elementwise, norms and the optimizer: bytes over bandwidth
    communication: dict[str, float] = field(default_factory=dict)  # by dimension of the mesh: what has to be waited for
    bubble: float = 0.0  # a pipeline that fills and drains
    hidden: dict[str, float] = field(default_factory=dict)  # communication that runs beside computation

    @property
    def total(self) -> float:
        return self.compute + self.memory + sum(self.communication.values()) + self.bubble
