"""Operations with kernels of their own. Blocks call these; docs/kernels.md tells which implementation runs."""

from treadle.kernels.adamw import adamw_step
from treadle.kernels.causal_attention import CAUSAL_ATTENTION
from treadle.kernels.draw import draw
from treadle.kernels.expert_rows import combine_rows, spread_rows
from treadle.kernels.fused_linear import fused_linear
from treadle.kernels.gates import gated_activation
from treadle.kernels.log_probabilities import log_probabilities
from treadle.kernels.norms import add_rms_norm, layer_norm, rms_norm
from treadle.kernels.operation import (
    BACKENDS,
    OPERATIONS,
    Choice,
    Floor,
    Operation,
    choose,
    explain,
    name_from_environment,
    use,
)
from treadle.kernels.paged_attention import PAGED_ATTENTION
from treadle.kernels.quantise import quantise_rows
from treadle.kernels.rope import rope
from treadle.kernels.store_rows import store_rows

__all__ = [
    "BACKENDS",
    "CAUSAL_ATTENTION",
    "OPERATIONS",
    "PAGED_ATTENTION",
    "Choice",
    "Floor",
    "Operation",
    "adamw_step",
    "add_rms_norm",
    "choose",
    "combine_rows",
    "draw",
    "explain",
    "fused_linear",
    "gated_activation",
    "layer_norm",
    "log_probabilities",
    "quantise_rows",
    "rms_norm",
    "rope",
    "spread_rows",
    "store_rows",
    "use",
]

name_from_environment()
