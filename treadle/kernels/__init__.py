"""Operations with kernels of their own. Blocks call these; docs/kernels.md tells which implementation runs."""

from treadle.kernels.norms import add_rms_norm, rms_norm
from treadle.kernels.operation import BACKENDS, OPERATIONS, Choice, Floor, Operation, choose, explain, use

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "Choice",
    "Floor",
    "Operation",
    "add_rms_norm",
    "choose",
    "explain",
    "rms_norm",
    "use",
]
