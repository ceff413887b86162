"""How many processes share a run, and in which way: the `parallel` section of a training recipe."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from treadle.config import Config
from treadle.errors import ConfigError
from treadle.nn.moe import MoEConfig
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.fits import misfit

Reshard = Literal["auto", "after_forward", "never"]
Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]

# Stages on each process; the last two go down the processes and up again, so that first and last stage share one.
SINGLE: tuple[Schedule, ...] = ("gpipe", "1f1b")
V_SHAPED: tuple[Schedule, ...] = ("zbv", "dualpipev")
ZERO_BUBBLE: tuple[Schedule, ...] = ("interleaved_zero_bubble", "zbv", "dualpipev")


class ParallelConfig(Config):
    """Sizes multiply to the number of processes. One process needs none of these keys."""

    pipeline: PositiveInt = Field(1, description="processes that the layers are dealt to, in stages")
    schedule: Schedule = Field("1f1b", description="the order in which a pipeline's stages run micro-batches")
    stages_per_process: PositiveInt | None = Field(
        None, description="stages of a pipeline on each process; null: 1 for gpipe and 1f1b, 2 for the others"
    )
    stage_layers: list[PositiveInt] | None = Field(
        None, description="layers of each stage, in order; null: shared out by FLOPs"
    )
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
        "before it; auto: after_forward, in a pipeline never",
    )
    cpu_offload: bool = Field(False, description="keep weights, gradients and optimizer state in host memory")
    timeout: PositiveFloat = Field(
        1800.0, description="seconds without progress after which stacks are written and the run ends"
    )

    @property
    def stages(self) -> int:
        """All stages of the pipeline."""
        return self.pipeline * (self.stages_per_process or (1 if self.schedule in SINGLE else 2))

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
    "context": "context parallelism",
}


def check_layout(
    config: ParallelConfig,
    world: int,
    model: TransformerConfig,
    batch_size: int,
    length: int | None = None,
    *,
    rows: int | None = None,
) -> Layout:
    """The layout for `world` processes, if model and batch, of rows of `length` tokens, can be cut like this.

    rows: that go through the model at a time; None: all that a process has.
    Needs no process group. Raises one ConfigError with everything that does not fit, each with its nearest fix.
    """
    layout = config.layout(world)
    problems = list(_problems(config, layout, model, batch_size, rows or batch_size))
    if length is not None and length % layout.tensor:
        below = length // layout.tensor * layout.tensor
        fits = ", ".join(str(n) for n in (below, below + layout.tensor) if n)
        message = f"{length} tokens cannot be shared out equally to parallel.tensor={layout.tensor}; try {fits}"
        problems.append(("training.sequence_length", message))
    if problems:
        raise ConfigError("\n".join(f"{key}: {message}" for key, message in problems))
    return layout


def _problems(
    config: ParallelConfig, layout: Layout, model: TransformerConfig, batch_size: int, rows: int
) -> Iterator[tuple[str, str]]:
    if layout.tensor > 1 and (found := misfit(model, layout.tensor)):
        size, fits = found
        what = "neither divides nor is a multiple of" if size.shareable else "does not divide"
        shown = ", ".join(map(str, fits))
        yield "parallel.tensor", f"{layout.tensor} {what} {size.name}={size.count}; the whole model fits {shown}"
    if config.async_tensor and layout.tensor == 1:
        yield "parallel.async_tensor", "there is nothing to be sent with parallel.tensor=1; leave it out"
    yield from _expert_problems(layout, model)
    if batch_size % layout.data:
        lower, upper = batch_size // layout.data * layout.data, -(-batch_size // layout.data) * layout.data
        near = ", ".join(str(fit) for fit in (lower, upper) if fit)
        message = f"{batch_size} rows cannot be shared out equally to replicate x shard = {layout.data}; try {near}"
        yield "training.batch_size", message
    elif layout.pipeline > 1:
        yield from _pipeline_problems(config, len(model.expand()), batch_size // layout.data, rows)
    if layout.pipeline > 1 and config.schedule in ZERO_BUBBLE:
        # Their linear layers add to a weight's gradient by themselves, and know nothing of parts of weights.
        for key in ("tensor", "expert"):
            if getattr(layout, key) > 1:
                message = f"{config.schedule} does not go together with parallel.{key}={getattr(layout, key)}"
                yield "parallel.schedule", f"{message}; try 1f1b or interleaved_1f1b, or set {key} to 1"
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


def _pipeline_problems(config: ParallelConfig, layers: int, rows: int, at_a_time: int) -> Iterator[tuple[str, str]]:
    """rows: of one process. at_a_time: of them, a micro-batch."""
    ranks, schedule, stages = config.pipeline, config.schedule, config.stages
    each = stages // ranks
    if schedule in SINGLE and each != 1:
        yield "parallel.stages_per_process", f"{each}, but schedule={schedule} has 1; try interleaved_1f1b"
    if schedule in V_SHAPED and each != 2:
        yield "parallel.stages_per_process", f"{each}, but schedule={schedule} has 2; leave it out"
    if stages > layers:
        what = f"{ranks}" if each == 1 else f"{ranks} x {each} stages of schedule={schedule}"
        fewer = f"; try {layers // each}" if layers // each > 1 else ""
        yield "parallel.pipeline", f"{what} is more than the model's {layers} layers{fewer}"
    if config.stage_layers is not None and (len(config.stage_layers), sum(config.stage_layers)) != (stages, layers):
        told = f"{config.stage_layers} should be {stages} numbers that add up to {layers}"
        yield "parallel.stage_layers", told
    if not _fits(schedule, ranks, stages, rows, at_a_time):
        found = [size for size in range(1, rows + 1) if _fits(schedule, ranks, stages, rows, size)]
        fits = f"try {', '.join(map(str, found))}" if found else "raise training.batch_size"
        least = {"1f1b": f" and at least {ranks}", "dualpipev": f" and at least {stages}"}.get(schedule, "")
        if schedule.startswith("interleaved"):
            least = f", in rounds of {ranks} or more that are equal"
        yield (
            "training.micro_batch_size",
            f"{min(at_a_time, rows)} cuts the {rows} rows of a process into {-(-rows // at_a_time)} micro-batches; "
            f"schedule={schedule} needs equal ones{least}: {fits}",
        )


def _fits(schedule: Schedule, ranks: int, stages: int, rows: int, at_a_time: int) -> bool:
    """Whether a schedule can run the micro-batches that rows are cut into."""
    at_a_time = min(rows, at_a_time)
    number = rows // at_a_time
    if rows % at_a_time:
        return False
    if schedule.startswith("interleaved"):
        return number % max(1, number // ranks) == 0
    return number >= {"1f1b": ranks, "dualpipev": stages}.get(schedule, 1)


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
