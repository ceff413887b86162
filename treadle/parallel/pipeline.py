"""Layers dealt to processes in stages: micro-batches flow through them in an order that PyTorch's schedules lay down.

Each process holds one model, the stages that are its own, under the names that they have in the whole: so checkpoints,
optimizers and sharding see nothing new. Between stages only the residual stream travels. Every process of a pipeline
reads the same rows, and a stage is told the number of a micro-batch alone: it finds tokens, positions and documents in
its own copy.

What the loss does is not known here either. Each stage runs the loss function, which calls `model.hidden` once; there
it becomes the stage, and only the last one returns from it.

B batch, S sequence, D model dim.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from treadle.attention import AttentionContext
from treadle.nn.flops import forward_flops
from treadle.nn.transformer import Transformer
from treadle.parallel.config import SINGLE, V_SHAPED, ZERO_BUBBLE, ParallelConfig, Schedule
from treadle.parallel.cut_modules import stream_length
from treadle.parallel.data import accumulate_gradients, reduce_gradients
from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import local
from treadle.parallel.weight_gradients import WeightGradients, defer_weight_gradients

T = TypeVar("T")

CLASSES: dict[Schedule, str] = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


class Rows(Protocol):
    """A micro-batch, as far as it matters here."""

    @property
    def tokens_BS(self) -> Tensor: ...


Objective = Callable[[Transformer, Any], Tensor]


def cut(model: Transformer, mesh: Mesh, config: ParallelConfig, length: int) -> None:
    """Keep of a model, built without memory, the stages of this process. A no-op without a pipeline.

    length: of a sequence, for the cost of attention. Under a zero-bubble schedule linear layers now leave the gradient
    of their weight to the schedule. Comes before everything else that is applied to a model.
    """
    if mesh.pipeline is None:
        return
    counts = config.stage_layers or balance(*costs(model, length), config.stages)
    starts = [sum(counts[:stage]) for stage in range(config.stages + 1)]
    rank = mesh.pipeline.get_local_rank()
    mine = [stage for stage in range(config.stages) if _process(stage, config) == rank]
    stages = {stage: tuple(str(i) for i in range(starts[stage], starts[stage + 1])) for stage in mine}
    kept = [layer for layers in stages.values() for layer in layers]
    for layer in list(model.layers):
        if layer not in kept:
            del model.layers[layer]
    first, last = 0 in stages, config.stages - 1 in stages
    further = model.multi_token is not None
    drop = {
        "embedding": not first and not (last and (model.config.tied or further)),
        "embedding_norm": not first and not (last and further),
        "position": not first,
        "norm": not last,
        "head": not last,
        "multi_token": not last,
    }
    for name, dropped in drop.items():
        if dropped:
            setattr(model, name, None)
    model.pipeline = Pipeline(model, mesh, config, stages)  # type: ignore[assignment]


def pipeline_of(model: nn.Module) -> "Pipeline | None":
    """The pipeline that a model is a part of."""
    return cast("Pipeline | None", getattr(model, "pipeline", None))


def own_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """A process's parameters, without those that another stage of its pipeline holds too and answers for."""
    pipeline = pipeline_of(model)
    for name, parameter in model.named_parameters():
        if pipeline is None or pipeline.first or name not in pipeline.copies:
            yield parameter


def at_the_end(model: Transformer, function: Callable[[Transformer], T]) -> T | None:
    """function(model), without a backward. On a pipeline None, but on the process that has the last stage.

    function calls `model.hidden` once, alike on all processes of the pipeline.
    """
    pipeline = pipeline_of(model)
    if pipeline is None:
        return function(model)
    try:
        return function(_AtStage.of(model, pipeline.pass_on))
    except _NotTheLast:
        return None


def costs(model: Transformer, length: float) -> tuple[list[float], float]:
    """Forward FLOPs per token of each layer, and of what follows the last one."""
    layers = [forward_flops(layer, length) for layer in model.layers.values()]
    end = forward_flops(model.head, length)
    if model.multi_token is not None:
        end = end * (1 + len(model.multi_token.layers)) + forward_flops(model.multi_token, length)
    return layers, end


def balance(layers: Sequence[float], end: float, stages: int) -> list[int]:
    """How many consecutive layers each stage gets (at least one), so that the dearest stage is as cheap as can be.

    end: what the last stage has to do besides. Among equals those whose costs are closest to each other.
    """
    total = len(layers)
    before = [sum(layers[:i]) for i in range(total + 1)]
    # best[i]: of the first i layers in the stages so far, (dearest, sum of squares, counts)
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(stages):
        left, extra = stages - stage - 1, end if stage == stages - 1 else 0.0
        found: dict[int, tuple[float, float, list[int]]] = {}
        for stop in [total] if left == 0 else range(stage + 1, total - left + 1):
            options = []
            for start, (dearest, squares, counts) in best.items():
                cost = before[stop] - before[start] + extra
                if start < stop:
                    options.append((max(dearest, cost), squares + cost * cost, [*counts, stop - start]))
            found[stop] = min(options)
        best = found
    return best[total][2]


def _process(stage: int, config: ParallelConfig) -> int:
    """Which process of the pipeline has a stage: they go round, or down and up again."""
    turn, place = divmod(stage, config.pipeline)
    return config.pipeline - 1 - place if turn % 2 and config.schedule in V_SHAPED else place


class Pipeline:
    """The stages of this process, and what runs them. Made by `cut`; `model.pipeline` is it.

    stages: the layers of each stage here. copies: names of parameters that the first and the last stage both have, on
    different processes (an embedding that is also the head, or read by multi-token prediction): they start the same,
    and get the same gradient.
    """

    def __init__(self, model: Transformer, mesh: Mesh, config: ParallelConfig, stages: dict[int, tuple[str, ...]]):
        assert mesh.pipeline is not None
        self.model, self.mesh, self.schedule, self.stages = model, mesh, config.schedule, stages
        self.count = config.stages
        self.first, self.last = 0 in stages, self.count - 1 in stages
        self.group = mesh.pipeline.get_group()
        self.ranks = [dist.get_global_rank(self.group, _process(stage, config)) for stage in range(self.count)]
        # Of the pipelines beside each other, the first one's last stage: whose word is taken where one has to choose.
        self.end_rank = _process(self.count - 1, config) * (mesh.world.size // config.pipeline)
        self.copies: set[str] = set()
        if self.first != self.last:
            both = {
                "embedding": model.config.tied or model.config.multi_token,
                "embedding_norm": model.config.multi_token,
            }
            self.copies = {name for name, _ in model.named_parameters() if both.get(name.partition(".")[0])}
        self.queues: dict[int, WeightGradients] = {}
        if config.schedule in ZERO_BUBBLE:
            for stage, layers in stages.items():
                modules: list[nn.Module] = [model.layers[layer] for layer in layers]
                if stage == self.count - 1 and model.multi_token is not None:
                    modules.append(model.multi_token)
                self.queues[stage] = defer_weight_gradients(modules)
        self._ready: dict[tuple[int, ...], tuple[Any, list[_StageModule]]] = {}

    def step(self, objective: Objective, batches: Sequence[Rows]) -> None:
        """Add the gradient of the sum of objective(model, batch) to `.grad`, summed over processes as it should be.

        objective: -> scalar; its result is called for on the last stage only. batches: of one shape, on the device.
        """
        shapes = {tuple(batch.tokens_BS.shape) for batch in batches}
        if len(shapes) > 1:
            raise ValueError(f"the micro-batches of a pipeline must have one shape, not {sorted(shapes)}")
        rows = shapes.pop()[0]
        schedule, modules = self._schedule(len(batches), rows, stream_length(self.model, batches[0].tokens_BS))
        for module in modules:
            module.objective, module.batches = objective, batches
        accumulate_gradients(self.model)
        numbers = torch.arange(len(batches))  # what each stage gets as its input besides: the batches are here
        inputs, target = (numbers,) if self.first else (), numbers if self.last else None
        schedule.step(*inputs, target=target, return_outputs=False, number=numbers)
        left = sum(len(queue.waiting) for queue in self.queues.values())
        assert not left, f"{left} gradients of weights were left over by schedule {self.schedule}"
        for module in modules:
            module.objective, module.batches = None, ()
        reduce_gradients(self.model)
        self._sum_copies()

    @torch.no_grad()
    def pass_on(self, tokens_BS: Tensor, context: AttentionContext) -> Tensor:
        """All stages one after the other, without a backward: the hidden states, where the last stage is."""
        x_BSD: Tensor | None = None
        shape = (len(tokens_BS), stream_length(self.model, tokens_BS, context), self.model.config.dim)
        sent = []
        for stage, layers in self.stages.items():
            if stage > 0 and stage - 1 not in self.stages:
                x_BSD = torch.empty(shape, dtype=self.model.dtype, device=self.mesh.device)
                dist.recv(x_BSD, self.ranks[stage - 1], group=self.group)
            x_BSD = self.model.segment(x_BSD, tokens_BS, context, layers)
            if stage + 1 < self.count and stage + 1 not in self.stages:
                sent.append((dist.isend(x_BSD, self.ranks[stage + 1], group=self.group), x_BSD))
                x_BSD = None
        for work, _ in sent:
            work.wait()  # type: ignore[union-attr]
        if x_BSD is None or not self.last:
            raise _NotTheLast(None)
        return x_BSD

    def _schedule(self, number: int, batch: int, length: int) -> tuple[Any, list["_StageModule"]]:
        """PyTorch's schedule for so many micro-batches of this shape; it holds a buffer for each.

        length: of the residual stream between stages.
        """
        key = (number, batch, length)
        if key not in self._ready:
            # What travels is said beforehand, on every stage: PyTorch would find it out by a forward and a backward on
            # memory that nobody has written, which count as any other (of experts' load, say).
            dtype = self.model.dtype
            wide = torch.promote_types(dtype, torch.float32)
            meta: dict[str, Any] = {"device": "meta", "requires_grad": True}
            x_BSD = torch.empty(batch, length, self.model.config.dim, dtype=dtype, **meta)
            loss = torch.empty((), dtype=wide, **meta)
            number_1 = torch.empty(1, dtype=torch.int64, device="meta")
            modules = [_StageModule(self, stage) for stage in self.stages]
            stages = [
                _Stage(
                    module,
                    stage,
                    self.count,
                    self.mesh.device,
                    input_args=(x_BSD if stage > 0 else number_1,),
                    output_args=(x_BSD if stage < self.count - 1 else loss,),
                    group=self.group,
                    dw_builder=self.queues[stage].take if stage in self.queues else None,
                )
                for stage, module in zip(self.stages, modules, strict=True)
            ]
            # An error would come with the table of all that was to be run.
            logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
            kind: Any = get_schedule_class(CLASSES[self.schedule])
            own = stages[0] if self.schedule in SINGLE else stages
            # Losses are sums, divided by a number of tokens that is the whole batch's.
            self._ready[key] = kind(own, number, loss_fn=lambda output, target: output, scale_grads=False), modules
        return self._ready[key]

    def _sum_copies(self) -> None:
        """Give both holders of a parameter the sum of their gradients, the same to the last bit."""
        if not self.copies:
            return
        peer = self.ranks[-1] if self.first else self.ranks[0]
        for name, parameter in self.model.named_parameters():
            if name in self.copies and parameter.requires_grad:
                assert parameter.grad is not None, name
                mine = local(parameter.grad)
                sent, received = mine.contiguous(), torch.empty_like(mine, memory_format=torch.contiguous_format)
                both = [
                    dist.P2POp(dist.isend, sent, peer, self.group),
                    dist.P2POp(dist.irecv, received, peer, self.group),
                ]
                for work in dist.batch_isend_irecv(both):
                    work.wait()
                mine.add_(received)


class _Stage(PipelineStage):
    """PyTorch's, but that a process does not greet itself: gloo cannot send there (torch 2.11, V-shaped schedules)."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        operations = super()._get_init_p2p_neighbors_ops()
        return [operation for operation in operations if operation.peer != dist.get_rank()]


class _StageModule(nn.Module):
    """What PyTorch calls to run a stage. It has no parameters of its own: PyTorch would take sharding into its hands,
    which here is the whole model's affair (`accumulate_gradients`)."""

    def __init__(self, pipeline: Pipeline, stage: int):
        super().__init__()
        self.layers, self.starts, self.ends = pipeline.stages[stage], stage == 0, stage == pipeline.count - 1
        self.hidden_model = (pipeline.model,)  # in a tuple, or it would become a part of this module
        self.objective: Objective | None = None
        self.batches: Sequence[Rows] = ()

    def forward(self, x_BSD: Tensor, number: Tensor) -> Tensor:
        assert self.objective is not None
        (model,) = self.hidden_model

        def hidden(tokens_BS: Tensor, context: AttentionContext) -> Tensor:
            found = model.segment(None if self.starts else x_BSD, tokens_BS, context, self.layers)
            if self.ends:
                return found
            raise _NotTheLast(found)

        try:
            return self.objective(_AtStage.of(model, hidden), self.batches[int(number)])
        except _NotTheLast as reached:
            return cast(Tensor, reached.x_BSD)


class _NotTheLast(BaseException):
    """How a stage leaves the loss function, unless it is the last. No `Exception`: it is nobody's to catch."""

    def __init__(self, x_BSD: Tensor | None):
        self.x_BSD = x_BSD


class _AtStage:
    """The model as a loss function gets it: all its own, but that `hidden` goes on in another process."""

    def __init__(self, model: Transformer, hidden: Callable[[Tensor, AttentionContext], Tensor]):
        self._model, self._hidden, self._called = model, hidden, False

    @classmethod
    def of(cls, model: Transformer, hidden: Callable[[Tensor, AttentionContext], Tensor]) -> Transformer:
        return cast(Transformer, cls(model, hidden))

    def hidden(self, tokens_BS: Tensor, context: AttentionContext | None = None) -> Tensor:
        if self._called:
            raise RuntimeError("model.hidden was called twice for one micro-batch; in a pipeline it can be called once")
        self._called = True
        return self._hidden(tokens_BS, context or AttentionContext.causal(*tokens_BS.shape, device=tokens_BS.device))

    def __call__(self, tokens_BS: Tensor, context: AttentionContext | None = None) -> Tensor:
        scores: Tensor = self._model.head(self.hidden(tokens_BS, context))
        return scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
