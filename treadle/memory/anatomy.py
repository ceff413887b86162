"""What the layers and ends of a model hold and compute, read off the modules' own facts."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from treadle.nn.config import LayerConfig
from treadle.nn.flops import forward_flops
from treadle.nn.linear import GroupedLinear, Linear
from treadle.nn.moe import MoE
from treadle.nn.roles import feature_matrices, parameter_roles
from treadle.nn.store import build_meta
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.config import ParallelConfig
from treadle.parallel.fits import blocks
from treadle.parallel.pipeline import balance, costs


@dataclass(frozen=True)
class Part:
    """A layer, or an end of the model. Numbers of elements: those that tensor parallelism cuts, those that all
    processes have whole, and those of experts, which may live apart (`expert`) and are cut as well.

    matrices: of all these, those that Muon steps; newton_schulz: FLOPs of one step of it on them. flops: of matmuls,
    forward for each token; narrow: of those the ones that fp8 takes; mixing: of attention. flexible: only flex knows
    it. travels: bf16 bytes of rows that a token sends to experts, one way.
    """

    cut: float = 0.0
    whole: float = 0.0
    experts: float = 0.0
    matrices: float = 0.0
    newton_schulz: float = 0.0
    flops: float = 0.0
    narrow: float = 0.0
    mixing: float = 0.0
    head_dim: int = 128
    flexible: bool = False
    travels: float = 0.0

    def here(self, tensor: int, expert: int = 1) -> float:
        """Elements on one process before they are sharded."""
        return self.cut / tensor + self.whole + self.experts / (tensor * expert)


@dataclass(frozen=True)
class Anatomy:
    """Of a model: its kinds of layers, the kind of each in order, its ends, modules of multi-token prediction."""

    kinds: tuple[tuple[LayerConfig, Part], ...]
    layers: tuple[int, ...]
    embedding: Part
    head: Part
    further: tuple[Part, ...]
    costs: tuple[tuple[float, ...], float]  # of layers and end, as stages are balanced by

    def stages(self, config: ParallelConfig) -> list[int]:
        """Layers of each stage of a pipeline."""
        return config.stage_layers or _balanced(self.costs, config.stages)


@functools.lru_cache(maxsize=4096)
def _balanced(costs: tuple[tuple[float, ...], float], stages: int) -> list[int]:
    return balance(*costs, stages)


def anatomy(spec: TransformerConfig, length: int) -> Anatomy:
    """length: of a row, for attention."""
    model = build_meta(spec)
    kinds: dict[str, tuple[LayerConfig, Part]] = {}
    layers = []
    for layer, module in zip(spec.expand(), model.layers.values(), strict=True):
        name = repr(layer)
        if name not in kinds:
            kinds[name] = layer, _part(module, length)
        layers.append(list(kinds).index(name))
    further = [] if model.multi_token is None else list(model.multi_token.layers.values())
    layer_costs, end = costs(model, length)
    return Anatomy(
        tuple(kinds.values()),
        tuple(layers),
        Part(cut=float(model.embedding.weight.numel())),
        Part(cut=float(model.head.weight.numel()), flops=forward_flops(model.head, length)),
        tuple(_part(module, length) for module in further),
        (tuple(layer_costs), end),
    )


def _part(module: nn.Module, length: int) -> Part:
    roles, inside = parameter_roles(module), [path for path, _ in blocks(module)]
    cut = whole = experts = matrices = newton_schulz = narrow = 0.0
    modules = dict(module.named_modules())
    square = feature_matrices(module)
    for name, parameter in module.named_parameters():
        owner: Any = modules[name.rpartition(".")[0]]
        within = any(name.startswith(f"{path}.") for path in inside)
        if isinstance(owner, GroupedLinear):
            experts += parameter.numel()
        elif within and (roles[name] == "column" or (roles[name] == "row" and parameter.ndim > 1)):
            cut += parameter.numel()
        else:
            whole += parameter.numel()
        if name in square:
            matrices += parameter.numel()
            narrow += 2 * parameter.numel() * isinstance(owner, Linear)
            parts = getattr(owner, "parts", None) or {"": parameter.shape[-2]}
            for rows in parts.values():
                small, large = sorted((rows, parameter.shape[-1]))
                stack = parameter.shape[0] if parameter.ndim == 3 else 1
                newton_schulz += stack * 5 * (4 * small * small * large + 2 * small**3)
    mixers: list[Any] = [m for m in module.modules() if hasattr(m, "mixing_flops")]
    facts = [mixer.facts for mixer in mixers if hasattr(mixer, "facts")]
    mixing = sum(m.mixing_flops(length) for m in mixers)
    travels = sum(2.0 * m.gate_up.active * m.gate_up.weight.shape[-1] for m in module.modules() if isinstance(m, MoE))
    return Part(
        *(cut, whole, experts, matrices, newton_schulz),
        flops=forward_flops(module, length) - mixing,
        narrow=narrow,
        mixing=mixing,
        head_dim=max((max(m.head_dims) for m in mixers if hasattr(m, "head_dims")), default=128),
        flexible=any(f.softcap is not None or f.alibi or f.sinks for f in facts),
        travels=travels,
    )
