"""What planning answers with, whichever engine computed it: memory by category, time by cause.

All memory is in bytes of one process's device, all time in seconds of one step.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

GIB = float(2**30)
TIGHT = 0.92  # of the memory: above, what fragments and what nobody predicts may not fit any more


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
    communication: dict[str, float] = field(
        default_factory=dict
    )  # what is waited for: by dimension of the mesh, the host
    bubble: float = 0.0  # a pipeline that fills and drains
    hidden: dict[str, float] = field(default_factory=dict)  # communication that runs beside computation

    @property
    def total(self) -> float:
        return self.compute + self.memory + sum(self.communication.values()) + self.bubble


@dataclass(frozen=True)
class Plan:
    """One layout, predicted. footprints: of a process of each rank of the pipeline."""

    footprints: tuple[Footprint, ...]
    time: StepTime  # of the rank that takes longest
    memory: float  # of the device, bytes
    tokens: int  # of a step, over all processes
    mfu: float  # causal attention FLOPs, over the data sheet's peak

    @property
    def peak(self) -> float:
        """Bytes on the process that needs most."""
        return max(footprint.total for footprint in self.footprints)

    @property
    def allocated(self) -> float:
        """Of the peak, what PyTorch's allocator counts (`torch.cuda.max_memory_allocated`)."""
        return max(footprint.total - footprint.overhead for footprint in self.footprints)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.total

    @property
    def verdict(self) -> Literal["fits", "tight", "does not fit"]:
        share = self.peak / self.memory
        return "does not fit" if share > 1 else "tight" if share > TIGHT else "fits"

    def summary(self) -> dict[str, float | str]:
        """What a run records, to be held against what it measures."""
        return {
            "memory_gib": self.allocated / GIB,
            "step_seconds": self.time.total,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "verdict": self.verdict,
        }

    def to_dict(self) -> dict[str, Any]:
        return self.summary() | {"footprints": [asdict(f) for f in self.footprints], "time": asdict(self.time)}
