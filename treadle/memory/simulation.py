"""Steps of a few layers and micro-batches on fake tensors, and from them those of any number.

Fake tensors have shapes and no memory; a fake process group answers every collective at once. So any process of any
layout runs here, `treadle.memory.live` watching what it would hold, and nothing of the build path is written twice.

Depth costs no time: memory at a given moment, FLOPs and bytes sent grow linearly with the number of layers of a kind
and with the number of micro-batches, once there are a few of each. Few are run, one more of each, and the rest follows.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining import stage as stages

from treadle.attention import AttentionContext
from treadle.config import Config
from treadle.data.packing import Batch
from treadle.memory.fused import backend
from treadle.memory.live import HOST, LiveMemory, watch
from treadle.memory.stand_ins import even_load, on_cuda
from treadle.nn.config import LayerConfig
from treadle.nn.store import build_meta
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.parallel import config as layouts
from treadle.parallel.config import Layout, ParallelConfig
from treadle.parallel.gradients import clip_factor, gradient_norm, scale_gradients
from treadle.parallel.mesh import Mesh, World, make_mesh
from treadle.parallel.pipeline import balance, costs, own_parameters
from treadle.train import setup
from treadle.train.config import TrainingConfig
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, OptimizerConfig, trainable
from treadle.train.routing import balance as balance_experts

FEW = 4  # layers of a kind: the first two and the last two of them have moments of their own


class DryRunConfig(Config):
    """What of a training recipe decides about memory."""

    imports: tuple[str, ...] = ()
    model: TransformerConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = AdamWConfig()


@dataclass(frozen=True)
class Case:
    """One simulation: so many layers of each kind in each stage, and so many micro-batches."""

    layers: tuple[tuple[tuple[str, int], ...], ...]  # by stage: (kind, number)
    micro_batches: int


def _case(layers: list[dict[str, int]], micro_batches: int) -> Case:
    return Case(tuple(tuple(counts.items()) for counts in layers), micro_batches)


@dataclass
class Seen:
    """Amounts by key, all of which are linear: ("memory", moment, category, module), ("flops",), ("bytes", ...)."""

    amounts: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def plus(self, factor: float, more: "Seen", less: "Seen") -> "Seen":
        moments = {key[1] for key in self.amounts if key[0] == "memory"}  # another is between two of these, or less
        keys = self.amounts.keys() | {key for key in more.amounts if key[0] != "memory" or key[1] in moments}
        slopes = {key: more.amounts.get(key, 0.0) - less.amounts.get(key, 0.0) for key in keys}
        return Seen({key: self.amounts.get(key, 0.0) + factor * slopes[key] for key in keys})


def _kind(layer: LayerConfig) -> str:
    return layer.model_dump_json()


def full_case(config: DryRunConfig, layout: Layout) -> Case:
    kinds = [_kind(layer) for layer in config.model.expand()]
    counts = [len(kinds)]
    if layout.pipeline > 1:
        whole = build_meta(config.model)
        counts = config.parallel.stage_layers or balance(
            *costs(whole, config.training.sequence_length), config.parallel.stages
        )
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    layers = [tuple(Counter(kinds[end - count : end]).items()) for end, count in zip(ends, counts, strict=True)]
    rows = config.training.batch_size // layout.data
    return Case(tuple(layers), rows // min(rows, config.training.rows))


@contextmanager
def fake_world(world: int, rank: int, layout: Layout) -> Iterator[Mesh]:
    """A process of a mesh whose other processes do not exist."""
    if world == 1:
        yield _FakeMesh()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    with mock.patch.object(dist, "new_group", _in_fake_groups(dist.new_group)):
        mesh = make_mesh(World(rank, world), layout, torch.device("cpu"))
    yield _FakeMesh(**{each.name: getattr(mesh, each.name) for each in dataclasses.fields(mesh)})
    dist.destroy_process_group()


def _in_fake_groups(new_group: Any) -> Any:
    return lambda *_, **__: new_group(backend="fake")


class _FakeMesh(Mesh):
    """Whose processes all have the same to say."""

    def sum_counts(self, *counts: int) -> list[int]:
        return [count * self.layout.data * self.layout.context for count in counts]

    def union(self, values: dict[str, Any]) -> dict[str, Any]:
        # The last stage's loss, on the others; long enough to pass for a mixture's load.
        return {"loss": torch.zeros(4)} | values


class _FakeTensors(FakeTensorMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or compiled layers would run as if they were not


class Simulation:
    """Runs cases of one configuration on one process of its layout. mine: the stages that are here."""

    def __init__(self, config: DryRunConfig, mesh: Mesh, device: str, mine: list[int]):
        self.config, self.mesh, self.device, self.mine = config, mesh, device, mine
        # One of each, for all cases: so they share what is compiled.
        self.meter, self.fake = LiveMemory(), _FakeTensors(allow_non_fake_inputs=True)
        self.backend = backend(self.meter)
        self.by_kind = {_kind(layer): layer for layer in config.model.expand()}
        self.names = _names(list(self.by_kind.values()))

    def extrapolated(self, full: Case) -> Seen:
        """The full case, from a few layers and micro-batches. What both add up to is a product: one after the other."""
        number = self._micro_batches(full)
        seen = self._at_depth(full, number)
        if number < full.micro_batches:
            numbers = range(number + 1, full.micro_batches + 1)
            parallel = self.config.parallel
            more = next(
                n for n in numbers if self.mesh.pipeline is None or parallel.schedule == "1f1b" or self._runs(n)
            )
            seen = seen.plus((full.micro_batches - number) / (more - number), self._at_depth(full, more), seen)
        return seen

    def _micro_batches(self, full: Case) -> int:
        """As few as fill the pipeline from here on, and as its schedule can run."""
        most, parallel = full.micro_batches, self.config.parallel
        if self.mesh.pipeline is None:
            return min(most, 2)
        if parallel.schedule == "1f1b":  # later stages never hold more, whatever is under way before them
            return min(most, parallel.pipeline - self.mesh.pipeline.get_local_rank() + 2)
        return next(n for n in range(min(len(full.layers) + 1, most), most + 1) if n == most or self._runs(n))

    def _runs(self, number: int) -> bool:
        parallel = self.config.parallel
        return layouts._fits(parallel.schedule, parallel.pipeline, parallel.stages, number, 1)

    def _at_depth(self, full: Case, micro_batches: int) -> Seen:
        here = set(self.mine)
        few = [
            {kind: min(n, FEW) for kind, n in counts} if stage in here else {counts[0][0]: 1}
            for stage, counts in enumerate(full.layers)
        ]
        base = self.run(_case(few, micro_batches))
        result = base
        for kind in self.by_kind:
            deeper = [stage for stage in self.mine if few[stage].get(kind, 0) < dict(full.layers[stage]).get(kind, 0)]
            if deeper:
                more = [{**counts, kind: counts[kind] + 1} if s in deeper else counts for s, counts in enumerate(few)]
                left = sum(dict(full.layers[stage])[kind] - few[stage][kind] for stage in deeper)
                result = result.plus(left / len(deeper), self.run(_case(more, micro_batches)), base)
        return result

    def run(self, case: Case) -> Seen:
        meter, fake = self.meter, self.fake
        with self._pretending(meter, fake):
            model = self._build(case)
            self._watch(meter, model)
            with fake:
                optimizers = self.config.optimizer.build(model).optimizers
                batches = self._batches(case)
                self._step_once(model, optimizers)
                with meter:
                    self._mark(meter, model, optimizers)
                    meter.begin()
                    meter.counting = True
                    self._step(meter, model, optimizers, batches)
                    meter.counting = False
        amounts: dict[tuple[Any, ...], float] = {("flops",): meter.costs.flops}
        amounts |= {("bytes", *key): float(size) for key, size in meter.costs.bytes.items()}
        for moment in meter.peaks:
            for (category, module), size in meter.at(moment).items():
                amounts["memory", moment, category, module] = float(size)
        meter.forget()
        return Seen(amounts)

    @contextmanager
    def _pretending(self, meter: LiveMemory, fake: FakeTensorMode) -> Iterator[None]:
        to_empty = Transformer.to_empty

        def given_fake_memory(model: Transformer, **options: Any) -> Transformer:
            with fake:
                return to_empty(model, **options)

        compiled = {"backend": self.backend}
        patches: list[Any] = [
            mock.patch.object(Transformer, "to_empty", given_fake_memory),
            mock.patch.object(Transformer, "initialise", lambda model, *_, **__: model),
            mock.patch.object(setup, "compile_layers", partial(setup.compile_layers, **compiled)),
            mock.patch.object(setup, "compile_between", partial(setup.compile_between, **compiled)),
            # Constants of graphs, which the partitioner copies; nobody writes to them.
            mock.patch.object(torch.Tensor, "__deepcopy__", lambda tensor, _: tensor),
            even_load(),
            # It asks for as many micro-batches as there are stages; a process by itself can do with fewer.
            mock.patch.object(schedules.Schedule1F1B, "__init__", schedules.PipelineScheduleSingle.__init__),
        ]
        if hasattr(schedules._PipelineSchedule, "_warmup_p2p"):  # torch 2.13 lets stages vote on what all know
            patches.append(mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", _all_static))
        if self.device == "cuda":
            patches.append(on_cuda(meter, self.backend, compiled=self.config.training.compile))
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield

    @staticmethod
    def _step_once(model: Transformer, optimizers: list[Any]) -> None:
        """For the optimizers to have their state."""
        for parameter in trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _build(self, case: Case) -> Transformer:
        config = self.config
        stack = [kind for stage in case.layers for kind, number in stage for _ in range(number)]
        changed: dict[str, Any] = {"layers": [self.by_kind[kind] for kind in stack]}
        further: Any = config.model.multi_token
        if further is not None and getattr(further, "layer", None) is None:
            changed["multi_token"] = further.model_copy(update={"layer": config.model.expand()[-1]})
        parallel = config.parallel
        if len(case.layers) > 1:
            counts = [sum(number for _, number in stage) for stage in case.layers]
            parallel = parallel.model_copy(update={"stage_layers": counts})
        model = setup.build_model(
            config.model.model_copy(update=changed), config.training, seed=0, mesh=self.mesh, parallel=parallel
        )
        model.train()
        return model

    def _batches(self, case: Case) -> list[Batch]:
        training = self.config.training
        rows = min(training.rows, training.batch_size // self.mesh.layout.data)
        length = training.sequence_length
        tokens_BS = torch.zeros(rows, length, dtype=torch.int64)
        context, samples_B = AttentionContext.causal(rows, length), torch.zeros(rows, dtype=torch.int64)
        return [
            Batch(tokens_BS.clone(), tokens_BS.clone(), context, rows * length, samples_B, samples_B)
            for _ in range(case.micro_batches)
        ]

    def _step(self, meter: LiveMemory, model: Transformer, optimizers: list[Any], batches: list[Batch]) -> None:
        """As `treadle.train.loop` takes it."""
        meter.category, meter.module, meter.moment = "activations", "model", ("start",)
        training = self.config.training
        loss = partial(cross_entropy, z_loss=training.z_loss)
        result = forward_backward(model, batches, loss, mesh=self.mesh)
        offloaded = self.config.parallel.cpu_offload
        for name, parameter in model.named_parameters():
            meter.module = self._part(model, name)
            meter.mark([parameter.grad], HOST if offloaded else "gradients")
        meter.category, meter.module, meter.moment = "workspace", "optimizer", ("optimizer",)
        norm = gradient_norm(own_parameters(model), self.mesh)
        if training.clip_norm is not None:
            scale_gradients(model.parameters(), clip_factor(training.clip_norm, norm))
        for optimizer in optimizers:
            optimizer.step()
        balance_experts(model, result.loads)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _watch(self, meter: LiveMemory, model: Transformer) -> None:
        order: dict[str, list[str]] = {}
        for number, layer in enumerate(model.config.expand()):
            if str(number) in model.layers:
                order.setdefault(_kind(layer), []).append(str(number))
        for kind, indices in order.items():
            for place, index in enumerate(indices):
                # Distance to the nearer end of its kind: what is in the middle is never more than both.
                edge = min((place, "start"), (len(indices) - 1 - place, "end"), key=lambda end: (end[0], end[1]))
                watch(meter, model.layers[index], f"layers {self.names[kind]}", ("forward", self.names[kind], *edge))
                if not self.config.training.compile:
                    for path, module in model.layers[index].named_children():
                        watch(meter, module, f"layers {self.names[kind]} {path}", None)
        if model.embedding is not None:
            watch(meter, model.embedding, "embedding", ("forward", "embedding"))
        if model.multi_token is not None:
            for module in model.multi_token.layers.values():
                watch(meter, module, "multi_token", ("forward", "multi_token"))
        if model.head is not None:
            self._watch_loss(meter, model.head)

    @staticmethod
    def _watch_loss(meter: LiveMemory, head: Any) -> None:
        penalised_cross_entropy = head.penalised_cross_entropy

        def back(_: Any) -> None:
            meter.category, meter.module, meter.moment = "loss", "head", ("backward", "loss")

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = meter.module
            meter.module, meter.moment = "head", ("loss",)
            with meter.as_("loss"):
                total, penalty = penalised_cross_entropy(*args, **kwargs)
            meter.module = before
            total.register_hook(back)
            return total, penalty

        head.penalised_cross_entropy = watched

    def _mark(self, meter: LiveMemory, model: Transformer, optimizers: list[Any]) -> None:
        offloaded = self.config.parallel.cpu_offload
        states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
        for name, parameter in model.named_parameters():
            meter.module = self._part(model, name)
            meter.mark([parameter], HOST if offloaded else "parameters")
            meter.mark(states.get(parameter, {}).values(), HOST if offloaded else "optimizer")

    def _part(self, model: Transformer, name: str) -> str:
        first, _, rest = name.partition(".")
        if first != "layers":
            return first
        index, _, rest = rest.partition(".")
        found = f"layers {self.names[_kind(model.config.expand()[int(index)])]}"
        return found if self.config.training.compile else f"{found} {rest.partition('.')[0]}"

    def groups(self) -> dict[str, str]:
        """Dimensions of the mesh by the names of their process groups."""
        found = {}
        for name in ("batch", "pipeline", "context", "tensor", "expert", "expert_fsdp", "fsdp"):
            mesh = getattr(self.mesh, name)
            for dimension in () if mesh is None else mesh.mesh_dim_names:
                found[mesh.get_group(dimension).group_name] = "shard" if dimension == "shard_context" else dimension
        return found


def _names(layers: list[LayerConfig]) -> dict[str, str]:
    """A short name for each kind of layer."""
    found: dict[str, str] = {}
    for layer in layers:
        parts = [getattr(layer, part, None) for part in ("mixer", "feedforward")]
        name = "+".join(str(part.kind) for part in parts if part is not None) or str(getattr(layer, "kind", "layer"))
        number = sum(other.partition("#")[0] == name for other in found.values())
        found[_kind(layer)] = f"{name}#{number + 1}" if number else name
    return found


def _all_static(self: Any, stages_here: Any, *_: Any) -> None:
    for stage in stages_here:
        stage._inference_mode = stages.InferenceMode.STATIC
