"""Memory in closed form: what a process of each rank of a pipeline holds at the moment at which it holds most.

The moments: the loss, with all activations; the backward of each layer, which frees its own and adds its gradients; the
optimizer's step. Whichever is largest is the answer.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from treadle.kernels.linear_cross_entropy import chunk_tokens
from treadle.memory.anatomy import Anatomy, Part
from treadle.memory.devices import Device
from treadle.memory.facts import LayerFacts, layer_facts
from treadle.memory.plan import GIB, Footprint
from treadle.nn.config import LayerConfig
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.activation_checkpointing import (
    BudgetConfig,
    CheckpointingConfig,
    FullConfig,
    SelectiveConfig,
    offloads,
)
from treadle.parallel.config import SINGLE, V_SHAPED, ZERO_BUBBLE, Layout, ParallelConfig
from treadle.parallel.pipeline import _process as process_of
from treadle.train.config import TrainingConfig
from treadle.train.optimizers import MuonConfig, OptimizerConfig, SGDConfig
from treadle.train.setup import DTYPES

MASTER = 4  # bytes of a weight, and of a gradient where it is summed
WORKSPACE = 32 * 2**20  # cuBLAS, on Hopper
COMMUNICATOR = 0.2 * GIB  # buffers of one process group of NCCL


@dataclass(frozen=True)
class Setting:
    """What is planned: a run on `world` processes, that can be cut like this (`check_layout`)."""

    model: TransformerConfig
    training: TrainingConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    world: int
    device: Device
    anatomy: Anatomy  # of the model, for rows of this length

    @cached_property
    def layout(self) -> Layout:
        return self.parallel.layout(self.world)

    @property
    def rows(self) -> int:
        """Of a micro-batch, on one process."""
        return min(self.training.rows, self.training.batch_size // self.layout.data)

    @property
    def micro_batches(self) -> int:
        return self.training.batch_size // self.layout.data // self.rows

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on one process."""
        return self.rows * self.training.sequence_length // self.layout.context

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return DTYPES[self.training.precision].itemsize

    @property
    def shards(self) -> int:
        return self.layout.shard * self.layout.context

    @property
    def sharded(self) -> bool:
        """Whether FSDP holds the weights (as `shard_data` decides)."""
        alone = self.layout.replicate * self.shards == 1 and self.layout.tensor == 1
        return self.world > 1 and not (alone and self.layout.pipeline > 1)

    @property
    def freed(self) -> bool:
        """Whether gathered weights are freed after a layer's forward."""
        auto = self.parallel.reshard == "auto" and self.layout.pipeline == 1
        return self.parallel.reshard == "after_forward" or auto

    def facts(self, layer: LayerConfig) -> LayerFacts:
        layout = self.layout
        # Experts that live apart are not compiled.
        compiled = self.training.compile and not (
            layout.expert > 1 and hasattr(getattr(layer, "feedforward", 0), "experts")
        )
        gathered = layout.context if layout.context_method == "gather" else 1
        dtype: torch.dtype = DTYPES[self.training.precision]
        mode = self.training.activation_checkpointing
        return layer_facts(
            *(self.model, layer),
            dtype=dtype,
            compiled=compiled,
            tensor=layout.tensor,
            gathered=gathered,
            exchanged=layout.context > 1 and layout.context_method == "ulysses",
            fp8=self.training.fp8,
            budget=mode.share if isinstance(mode, BudgetConfig) else 1.0,
        )

    @cached_property
    def ranks(self) -> list["Rank"]:
        kinds = [(part, self.facts(layer)) for layer, part in self.anatomy.kinds]
        layers = [Layer(*kinds[kind], number) for number, kind in enumerate(self.anatomy.layers)]
        further = [Layer(part, self._further(), number) for number, part in enumerate(self.anatomy.further, start=1)]
        if self.layout.pipeline == 1:
            return [Rank(self, [*layers, *further], True, True, 0)]
        counts, found = self.anatomy.stages(self.parallel), []
        for rank in range(self.layout.pipeline):
            mine = [s for s in range(len(counts)) if process_of(s, self.parallel) == rank]
            chosen = [layer for s in mine for layer in layers[sum(counts[:s]) : sum(counts[: s + 1])]]
            last = len(counts) - 1 in mine
            found.append(Rank(self, [*chosen, *(further if last else [])], 0 in mine, last, rank))
        return found

    def _further(self) -> LayerFacts:
        last: LayerConfig = getattr(self.model.multi_token, "layer", None) or self.model.expand()[-1]
        facts, more = (
            self.facts(last),
            6 * self.model.dim * self.width,
        )  # the two normed, side by side, and their product
        return replace(facts, kept=facts.kept + more, dear=facts.dear + more, input=facts.input + more)


class Layer(NamedTuple):
    """number: in the whole stack."""

    part: Part
    facts: LayerFacts
    number: int

    def recomputed(self, mode: CheckpointingConfig) -> tuple[float, bool]:
        """Of its matmuls, the share that the backward computes again; and whether attention is as well."""
        if isinstance(mode, FullConfig):
            return float(self.number % mode.every == 0), self.number % mode.every == 0
        if isinstance(mode, SelectiveConfig):
            return 1 - 1 / mode.matmuls if mode.matmuls else 1.0, False
        return self.facts.repeated, False

    def kept(self, mode: CheckpointingConfig) -> float:
        """Bytes of a token that wait for the backward, wherever."""
        if isinstance(mode, FullConfig) and self.number % mode.every == 0:
            return self.facts.input
        if isinstance(mode, SelectiveConfig):
            return self.facts.dear + (sum(self.facts.matmuls[:: mode.matmuls]) if mode.matmuls else 0.0)
        return self.facts.kept


@dataclass(frozen=True)
class Rank:
    """The layers of one rank of a pipeline, and whether it has the embedding and the head."""

    setting: Setting
    layers: list[Layer]
    first: bool
    last: bool
    number: int

    @cached_property
    def ends(self) -> list[Part]:
        """Embedding and head, where they are here; a shared one counts once."""
        found = self.setting.anatomy
        head = [found.head] if self.last else []
        embeds = self.first or (self.last and self.setting.model.multi_token is not None)
        return head + ([found.embedding] if embeds and not (head and self.setting.model.tied) else [])

    @cached_property
    def units(self) -> list[float]:
        """Elements of each layer, as it computes: of all that FSDP gathers, this process's share of matrices."""
        layout = self.setting.layout
        return [layer.part.here(layout.tensor, layout.expert) for layer in self.layers]

    @cached_property
    def root(self) -> float:
        return sum(part.here(self.setting.layout.tensor) for part in self.ends)

    @cached_property
    def own(self) -> float:
        """Elements of parameters on this process."""
        layout = self.setting.layout
        whole = sum(layer.part.here(layout.tensor) for layer in self.layers) + self.root
        return whole / (self.setting.shards if self.setting.sharded else 1)

    @cached_property
    def matrices(self) -> float:
        """Of them, those that Muon steps."""
        return sum(layer.part.matrices for layer in self.layers) / (self.setting.layout.tensor * self.setting.shards)

    def footprint(self) -> Footprint:
        setting = self.setting
        layout, training, T, w = setting.layout, setting.training, setting.tokens, setting.width
        on_device, n = not setting.parallel.cpu_offload, setting.micro_batches
        total_units = sum(self.units) + self.root
        parameters = MASTER * self.own * on_device
        optimizer = self._state() * on_device
        # Those that add up over micro-batches: shards, but in a pipeline whole until the last of them.
        whole = layout.pipeline > 1 or not setting.sharded
        gradients = (MASTER * total_units if whole else parameters) if n > 1 else 0.0
        stream = T * setting.model.dim * w / layout.tensor  # the residual stream
        held = in_flight(setting.parallel, layout.pipeline, n, self.number) if layout.pipeline > 1 else 1.0
        kept, casts = self._kept()
        activations = held * (sum(kept) * T + sum(casts))
        if offloads(training.activation_checkpointing):  # the last layer's, and one on its way
            activations = 2 * (max(kept) * T + max(casts))
        if layout.pipeline > 1:
            activations += held * stream  # what is sent on stays until its gradient comes
        if layout.pipeline > 1 and setting.parallel.schedule in ZERO_BUBBLE:  # of a stage, for gradients of weights
            each = setting.parallel.stages // layout.pipeline
            activations += T * sum(sum(layer.facts.matmuls) for layer in self.layers) / each
        ends = 2 * stream * self.last
        gathered = self._gathered()
        buffers = (2 * n * stream * (not self.first or not self.last)) if layout.pipeline > 1 else 0.0
        base = Footprint(
            parameters=parameters,
            optimizer=optimizer,
            gradients=gradients,
            communication=gathered + buffers,
            workspace=WORKSPACE,
            overhead=setting.device.context_gib * GIB + self._communicators() * COMMUNICATOR,
        )
        moments = []
        loss, after = self._loss()
        if self.last:
            # The last layer's weights are freed by then, where they are freed at all.
            there = setting.width * self.root if setting.sharded and setting.freed else gathered
            moments.append(replace(base, activations=activations + ends, loss=loss, communication=there + buffers))
        left, made = activations + ends, after if n == 1 else 0.0
        reducing = self._reducing()
        for unit, layer, size, cast in reversed(list(zip(self.units, self.layers, kept, casts, strict=True))):
            facts = layer.facts
            working = facts.working * T
            if size != facts.kept:
                working += facts.kept * T - size * T + (0.0 if setting.sharded else facts.weights)
            communication = base.communication + (reducing if setting.sharded else 0.0)
            moments.append(
                replace(
                    base,
                    activations=left + working + stream,
                    gradients=gradients + made,
                    loss=T * setting.model.dim * w * self.last,
                    communication=communication,
                )
            )
            left = max(left - size * T - cast, ends)
            if n == 1:
                made += MASTER * unit / (setting.shards if setting.sharded else 1) * (on_device or not setting.sharded)
        summed = MASTER * (total_units if not setting.sharded else self.own * on_device)
        if setting.sharded:  # embedding and head come last
            end = (MASTER + w) * self.root + gathered
            moments.append(replace(base, gradients=max(summed, gradients), communication=buffers + end))
        step = replace(base, gradients=summed, communication=buffers)
        if isinstance(setting.optimizer, MuonConfig):
            step = replace(step, workspace=WORKSPACE + 2 * 2 * self.matrices)  # bf16: what goes in, what comes out
        return max([*moments, step], key=lambda moment: moment.total)

    def _state(self) -> float:
        """Bytes of the optimizer's state."""
        optimizer = self.setting.optimizer
        if isinstance(optimizer, SGDConfig):
            return MASTER * self.own * bool(optimizer.momentum)
        both = 2 * MASTER * self.own
        return both - MASTER * self.matrices if isinstance(optimizer, MuonConfig) else both

    def _kept(self) -> tuple[list[float], list[float]]:
        """Per token and layer what is kept for the backward; and per layer the matrices that are."""
        kept = [layer.kept(self.setting.training.activation_checkpointing) for layer in self.layers]
        here = not self.setting.sharded
        casts = [
            layer.facts.weights * (here and size == layer.facts.kept)
            for layer, size in zip(self.layers, kept, strict=True)
        ]
        return kept, casts

    def _gathered(self) -> float:
        """Weights of whole layers: this one's, the next one's, and the buffer that it arrives in; or all of them.
        Embedding and head stay."""
        setting = self.setting
        if not setting.sharded:
            return 0.0
        largest = max(self.units)
        layers = min(len(self.units), 2) * largest if setting.freed else sum(self.units)
        return setting.width * (layers + largest + self.root)

    def _reducing(self) -> float:
        """A layer's gradients, and in float32 those that are on their way: its own and those of the layer before."""
        return (self.setting.width + 2 * MASTER) * max(self.units)

    def _loss(self) -> tuple[float, float]:
        """Head and cross entropy at their peak; and what stays of the head's gradient meanwhile."""
        setting = self.setting
        vocabulary = setting.anatomy.head.cut / setting.model.dim / setting.layout.tensor
        table, stream = vocabulary * setting.model.dim, setting.tokens * setting.model.dim * setting.width
        kind = "cpu" if setting.device.name == "cpu" else "cuda"
        chunk = chunk_tokens(torch.device(kind), int(vocabulary))
        # A loop's names hold the last chunk while the next is made. On a GPU, and of a whole vocabulary, logits become
        # their gradient in place.
        copies = (setting.tokens > chunk) + (1 if kind == "cuda" and setting.layout.tensor == 1 else 2)
        logits = copies * min(chunk, setting.tokens) * vocabulary * setting.width
        calls = 1 + len(setting.anatomy.further)
        gradient = MASTER * table * calls + stream * calls + stream * (setting.layout.tensor > 1)
        cast = 0.0 if setting.sharded else table * setting.width
        return gradient + logits + cast, (setting.width if setting.sharded else MASTER) * table * self.last

    def _communicators(self) -> int:
        layout = self.setting.layout
        sizes = (layout.pipeline, layout.replicate, self.setting.shards, layout.context, layout.tensor, layout.expert)
        return sum(size > 1 for size in sizes)


def in_flight(config: ParallelConfig, processes: int, number: int, rank: int) -> float:
    """Micro-batches whose activations a process holds at most, in units of all its layers."""
    each = config.stages // processes
    if config.schedule == "gpipe":
        return number
    if config.schedule == "1f1b":
        return min(number, processes - rank)
    if config.schedule == "interleaved_1f1b":
        return min(number, ((each - 1) * processes + 2 * (processes - rank - 1) + 1) / each)
    return min(number, processes + (0.5 if config.schedule == "dualpipev" else 0.0))


def bubble(config: ParallelConfig, processes: int, number: int) -> float:
    """Idle time of a step, in units of one micro-batch's forward and backward on one process.

    A zero-bubble schedule fills the gaps with gradients of weights, a third of the work.
    """
    each = config.stages // processes
    if config.schedule in SINGLE:
        return processes - 1
    if config.schedule == "interleaved_1f1b":
        return (processes - 1) / each
    few = config.schedule in V_SHAPED and number < 2 * processes
    return (processes - 1) / (each * 3) * (2 if few else 1)
