"""How many processes share a run, and in which way: the `parallel` section of a training recipe."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from treadle.attention.parts import Method, Order
from treadle.config import Config
from treadle.errors import ConfigError
from treadle.nn.config import LayerConfig
from treadle.nn.moe import MoEConfig
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.fits import misfit

Reshard = Literal["auto", "after_forward", "never"]


class ParallelConfig(Config):
    """Sizes multiply to the number of processes. One process needs none of these keys."""

    pipeline: PositiveInt = Field(1, description="stages that the layers are cut into")
    replicate: PositiveInt = Field(1, description="copies of the whole model that see different rows (DDP, HSDP)")
    shard: PositiveInt | None = Field(
        None, description="processes that share one copy of the weights and see different rows (FSDP); null: all left"
    )
    context: PositiveInt = Field(1, description="parts that each sequence is cut into")
    context_method: Method = Field(
        "gather",
        description="how attention reaches other parts: gather all keys and values; ulysses, whole rows of some heads "
        "each; ring, keys and values go round, for rows that are too long for gather",
    )
    context_order: Order = Field(
        "zigzag", description="parts of a sequence: zigzag, two pieces each, of equal work; contiguous, one piece"
    )
    tensor: PositiveInt = Field(1, description="parts that each matrix is cut into")
    async_tensor: bool = Field(
        False, description="matmuls of tensor parallelism run while their inputs and outputs are sent (CUDA, one node)"
    )
    expert: PositiveInt = Field(1, description="parts that the experts of a mixture are dealt to")
    reshard: Reshard = Field(
        "auto",
        description="gathered weights of a layer: freed after_forward and gathered again in the backward, or never "
        "before it; auto: after_forward",
    )
    cpu_offload: bool = Field(False, description="keep weights, gradients and optimizer state in host memory")
    timeout: PositiveFloat = Field(
        1800.0, description="seconds without progress after which stacks are written and the run ends"
    )

    def layout(self, world: int) -> "Layout":
        """The sizes for `world` processes. Raises ConfigError where they do not fit it."""
        given = self.pipeline * self.replicate * self.context * self.tensor
        shard = self.shard if self.shard is not None else max(1, world // given)
        layout = Layout(
            *(self.pipeline, self.replicate, shard, self.context, self.tensor, self.expert),
            context_method=self.context_method,
            context_order=self.context_order,
        )
        if layout.world != world:
            raise ConfigError(_wrong_world(self, layout, world))
        return layout


@dataclass(frozen=True)
class Layout:
    """How many ways each dimension of a run is cut; the product of all but `expert` is the number of processes."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    context_method: Method = "gather"
    context_order: Order = "zigzag"

    @property
    def world(self) -> int:
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks that read different rows of a batch."""
        return self.replicate * self.shard


# What a recipe may ask for, and this version cannot do. A size above one is refused.
MISSING = {
    "pipeline": "pipeline parallelism",
}


def check_layout(
    config: ParallelConfig, world: int, model: TransformerConfig, batch_size: int, sequence_length: int | None = None
) -> Layout:
    """The layout for `world` processes, if model and batch can be cut like this.

    sequence_length: of the rows; None where it is not known yet, and left to `own_part`.

    Needs no process group. Raises one ConfigError with everything that does not fit, each with its nearest fix.
    """
    layout = config.layout(world)
    problems = [*_problems(config, layout, model, batch_size), *context_problems(layout, model)]
    if sequence_length is not None:
        problems += _length_problems(layout, sequence_length)
    if problems:
        raise ConfigError("\n".join(f"{key}: {message}" for key, message in problems))
    return layout


def _problems(
    config: ParallelConfig, layout: Layout, model: TransformerConfig, batch_size: int
) -> Iterator[tuple[str, str]]:
    if layout.tensor > 1 and (found := misfit(model, layout.tensor)):
        cut, able = found
        what = "neither divides nor is a multiple of" if cut.shareable else "does not divide"
        shown = ", ".join(map(str, able))
        yield "parallel.tensor", f"{layout.tensor} {what} {cut.name}={cut.count}; the whole model fits {shown}"
    if config.async_tensor and layout.tensor == 1:
        yield "parallel.async_tensor", "there is nothing to be sent with parallel.tensor=1; leave it out"
    yield from _expert_problems(layout, model)
    layers = len(model.expand())
    if layout.pipeline > layers:
        yield "parallel.pipeline", f"{layout.pipeline} is more than the model's {layers} layers"
    if batch_size % layout.data:
        lower, upper = batch_size // layout.data * layout.data, -(-batch_size // layout.data) * layout.data
        rows = ", ".join(str(rows) for rows in (lower, upper) if rows)
        message = f"{batch_size} rows cannot be shared out equally to replicate x shard = {layout.data}; try {rows}"
        yield "training.batch_size", message
    if config.cpu_offload and layout.world == 1:
        yield "parallel.cpu_offload", "it needs at least two processes"
    for key, what in MISSING.items():
        if getattr(layout, key) > 1:
            yield f"parallel.{key}", f"{getattr(layout, key)}, but there is no {what} yet; set it to 1"


def _expert_problems(layout: Layout, model: TransformerConfig) -> Iterator[tuple[str, str]]:
    if layout.expert == 1:
        return
    parts = [getattr(layer, "feedforward", None) for layer in model.expand()]
    mixtures = sorted({(part.experts, part.dim) for part in parts if isinstance(part, MoEConfig)})
    if not mixtures:
        yield "parallel.expert", f"{layout.expert}, but no layer of the model has experts; set it to 1"
        return
    shared = layout.shard * layout.context
    fits = [n for n in range(1, shared + 1) if not any(_expert_misfit(n, shared, *m, model.dim) for m in mixtures)]
    misfits = [_expert_misfit(layout.expert, shared, *mixture, model.dim) for mixture in mixtures]
    if any(misfits):
        found = next(filter(None, misfits))
        yield "parallel.expert", f"{found}; try {', '.join(map(str, fits))}"


def _expert_misfit(size: int, shared: int, experts: int, inner: int, dim: int) -> str | None:
    """Why the experts of one mixture cannot be dealt to groups of `size` out of `shared` processes."""
    if shared % size:
        return f"{size} does not divide shard x context = {shared}"
    if experts % size:
        return f"{size} does not divide experts={experts}"
    groups, here = shared // size, experts // size
    # Each process holds whole experts, or equally many rows of each: FSDP cuts only a first dimension unequally.
    if size > 1 and here % groups and (2 * inner % groups or dim % groups):
        return f"with {size}, {groups} processes share {here} experts of {2 * inner} and {dim} rows, not equally"
    return None


def context_problems(layout: Layout, model: TransformerConfig) -> Iterator[tuple[str, str]]:
    """(key, message) for each reason why rows of this model cannot be cut over ranks like this."""
    if layout.context == 1:
        return
    for kind in sorted({_kind(layer) for layer in _layers(model) if not _in_parts(layer)}):
        yield "parallel.context", f"{layout.context}, but {kind} needs whole rows; set it to 1"
    if layout.context_method == "ulysses":
        shared = f" / parallel.tensor={layout.tensor}" if layout.tensor > 1 else ""
        for key, size in _divided(model, "heads", "kv_heads"):
            here = max(1, size // layout.tensor)
            if here % layout.context:
                message = f"ulysses deals heads to {layout.context} ranks, which does not divide {key}={size}{shared}"
                yield "parallel.context", f"{message}; try {choices(here)}, or context_method: gather"
                break


def _length_problems(layout: Layout, length: int) -> Iterator[tuple[str, str]]:
    chunks = layout.context * (2 if layout.context > 1 and layout.context_order == "zigzag" else 1)
    unit = math.lcm(chunks, layout.context * layout.tensor)
    fits = " or ".join(str(fit) for fit in (length // unit * unit, -(-length // unit) * unit) if fit)
    if length % chunks:
        cut = f"{layout.context_order} parts for parallel.context={layout.context} are {chunks} equal chunks of a row"
        yield "training.sequence_length", f"{cut}, and {length} is no multiple of {chunks}; try {fits}"
    elif length % unit:
        shared = f"parallel.tensor={layout.tensor} shares the {length // layout.context} tokens of a part of a row"
        yield "training.sequence_length", f"{shared}, and {length} is no multiple of {unit}; try {fits}"


def _layers(model: TransformerConfig) -> list[LayerConfig]:
    """Those of the stack, and that of multi-token prediction."""
    further: Any = getattr(model.multi_token, "layer", None)
    return [*model.expand(), *([] if further is None else further.expand())]


def _in_parts(layer: LayerConfig) -> bool:
    return getattr(getattr(layer, "mixer", None), "in_parts", False)


def _kind(layer: LayerConfig) -> str:
    mixer: Any = getattr(layer, "mixer", layer)
    return str(mixer.kind)


def _divided(model: TransformerConfig, *keys: str) -> Iterator[tuple[str, int]]:
    """Each different size under one of these keys anywhere in the layers."""
    seen = set()
    for layer in _layers(model):
        for part in ("mixer", "feedforward"):
            for key in keys:
                size: Any = getattr(getattr(layer, part, None), key, None)
                if isinstance(size, int) and (key, size) not in seen:
                    seen.add((key, size))
                    yield key, size


def choices(size: int) -> str:
    """The divisors of a size, as text."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    shown = divisors if len(divisors) <= 8 else [*divisors[:7], "..."]
    return ", ".join(map(str, shown))


def _wrong_world(config: ParallelConfig, layout: Layout, world: int) -> str:
    sizes = {key: getattr(layout, key) for key in ("pipeline", "replicate", "shard", "context", "tensor")}
    product = " x ".join(f"{key}={size}" for key, size in sizes.items() if size > 1) or "shard=1"
    rest = math.prod(size for key, size in sizes.items() if key != "shard")
    if config.shard is not None and world % rest == 0:
        fix = f"set parallel.shard: {world // rest} (or null)"
    elif world % rest == 0:
        fix = "leave parallel.shard out"
    else:
        fix = f"use a multiple of {rest} processes, or sizes that divide {world} ({choices(world)})"
    return f"parallel: {product} is {layout.world}, but there are {world} processes; {fix}"
