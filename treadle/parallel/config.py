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


def check_layout(
    config: ParallelConfig,
    world: int,
    model: TransformerConfig,
    batch_size: int,
    sequence_length: int | None = None,
    *,
    rows: int | None = None,
) -> Layout:
    """The layout for `world` processes, if model and batch can be cut like this.

    sequence_length: of the rows; None where it is not known yet, and left to `own_part`.

    rows: that go through the model at a time; None: all that a process has.
    Needs no process group. Raises one ConfigError with everything that does not fit, each with its nearest fix.
    """
    layout = config.layout(world)
    problems = [*_problems(config, layout, model, batch_size, rows or batch_size), *context_problems(layout, model)]
    if sequence_length is not None:
        problems += _length_problems(layout, sequence_length)
    if problems:
        raise ConfigError("\n".join(f"{key}: {message}" for key, message in problems))
    return layout


def _problems(
    config: ParallelConfig, layout: Layout, model: TransformerConfig, batch_size: int, rows: int
) -> Iterator[tuple[str, str]]:
    if layout.tensor > 1 and (found := misfit(model, layout.tensor)):
        cut, able = found
        what = "neither divides nor is a multiple of" if cut.shareable else "does not divide"
        shown = ", ".join(map(str, able))
        yield "parallel.tensor", f"{layout.tensor} {what} {cut.name}={cut.count}; the whole model fits {shown}"
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
    if config.cpu_offload and layout.world == 1:
        yield "parallel.cpu_offload", "it needs at least two processes"


def _expert_problems(layout: Layout, model: TransformerConfig) -> Iterator[tuple[str, str]]:
    if layout.expert == 1:
        return
    parts = [getattr(layer, "feedforward", None) for layer in model.expand()]
    mixtures = sorted({(part.experts, part.dim) for part in parts if isinstance(part, MoEConfig)})
    if not mixtures:
        yield "parallel.expert", f"{layout.expert}, but no layer of the model has experts; set it to 1"
        return
    shared = layout.shard * layout.context
    sizes = (shared, layout.tensor, model.dim)
    fits = [n for n in range(1, shared + 1) if not any(_expert_misfit(n, *sizes, *mixture) for mixture in mixtures)]
    misfits = [_expert_misfit(layout.expert, *sizes, *mixture) for mixture in mixtures]
    if any(misfits):
        found = next(filter(None, misfits))
        yield "parallel.expert", f"{found}; try {', '.join(map(str, fits))}"


def _expert_misfit(size: int, shared: int, tensor: int, dim: int, experts: int, inner: int) -> str | None:
    """Why the experts of one mixture cannot be dealt to groups of `size` out of `shared` processes."""
    if shared % size:
        return f"{size} does not divide shard x context = {shared}"
    if experts % size:
        return f"{size} does not divide experts={experts}"
    groups, here = shared // size, experts // size
    # Each process holds whole experts, or equally many rows of each: FSDP cuts only a first dimension unequally.
    if size > 1 and here % groups and tensor > 1:
        return (
            f"with {size}, {groups} processes share {here} experts that parallel.tensor={tensor} has cut, not equally"
        )
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
