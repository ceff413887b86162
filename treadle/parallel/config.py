"""How many processes share a run, and in which way: the `parallel` section of a training recipe."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from treadle.config import Config
from treadle.errors import ConfigError
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
        layout = Layout(self.pipeline, self.replicate, shard, self.context, self.tensor, self.expert)
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
    "context": "context parallelism",
}


def check_layout(
    config: ParallelConfig, world: int, model: TransformerConfig, batch_size: int, length: int | None = None
) -> Layout:
    """The layout for `world` processes, if model and batch, of rows of `length` tokens, can be cut like this.

    Needs no process group. Raises one ConfigError with everything that does not fit, each with its nearest fix.
    """
    layout = config.layout(world)
    problems = list(_problems(config, layout, model, batch_size))
    if length is not None and length % layout.tensor:
        below = length // layout.tensor * layout.tensor
        fits = ", ".join(str(n) for n in (below, below + layout.tensor) if n)
        message = f"{length} tokens cannot be shared out equally to parallel.tensor={layout.tensor}; try {fits}"
        problems.append(("training.sequence_length", message))
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


def _divided(model: TransformerConfig, *keys: str) -> Iterator[tuple[str, int]]:
    """Each different size under one of these keys anywhere in the layers."""
    seen = set()
    for layer in model.expand():
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
