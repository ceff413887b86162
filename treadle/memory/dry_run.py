"""A training step without a GPU: the real model, cut, wrapped and sharded as it would be, steps on fake tensors.

Each process of a pipeline is simulated in a process of its own; of alike ones in a row, the first and the last.
"""

import multiprocessing
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from treadle.config import resolve, to_dict
from treadle.errors import ConfigError
from treadle.memory.live import HOST
from treadle.memory.plan import Footprint
from treadle.memory.simulation import DryRunConfig, Seen, Simulation, fake_world, full_case
from treadle.parallel import config as layouts
from treadle.parallel.activation_checkpointing import offloads
from treadle.parallel.config import Layout, check_layout
from treadle.parallel.pipeline import _process as process_of
from treadle.train.session import SessionConfig

AT_A_TIME = 2  # processes that simulate


@dataclass(frozen=True)
class RankPlan:
    """One process of those that hold the same stages of the pipeline, in one step.

    modules: of the peak, bytes by the part of the model that they belong to. moment: when the peak is.
    communication: bytes of whole messages, by dimension of the mesh and operation.
    """

    pipeline_rank: int
    footprint: Footprint
    modules: dict[str, float]
    moment: str
    flops: float
    communication: dict[str, dict[str, float]]

    def towards(self, other: "RankPlan", rank: int) -> "RankPlan":
        """That of a rank between this and another, of which all is linear in the rank."""
        share = (rank - self.pipeline_rank) / (other.pipeline_rank - self.pipeline_rank)

        def between(a: Any, b: Any) -> Any:
            if isinstance(a, dict):
                return {key: between(value, b.get(key, 0.0)) for key, value in a.items()}
            return a + share * (b - a)

        footprint = Footprint(**between(dict(self.footprint), dict(other.footprint)))
        modules, sent = between(self.modules, other.modules), between(self.communication, other.communication)
        return RankPlan(rank, footprint, modules, self.moment, between(self.flops, other.flops), sent)


def dry_run(config: SessionConfig | DryRunConfig, world: int, *, device: str = "cuda") -> list[RankPlan]:
    """What each process of a pipeline would hold at its peak, send and compute in one step; one plan for each.

    Of the processes beside each other (replicate, shard, context, tensor) the first stands for all.
    device: whose kernels are assumed, cuda or cpu. Raises ConfigError where model, batch and layout do not fit.
    """
    model, training = config.model, config.training
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size: not set, and a dry run has no tokenizer to take it from; give a number")
    if offloads(training.activation_checkpointing):
        raise ConfigError("training.activation_checkpointing: a dry run cannot follow activations into host memory")
    arguments = (config.parallel, world, model, training.batch_size, training.sequence_length)
    layout = check_layout(*arguments, rows=training.rows)
    plain = {name: value for name, value in to_dict(config).items() if name in DryRunConfig.model_fields}
    # A CPU has no matmuls that send while they compute; what they hold is what those do that are sent for first.
    plain["parallel"] = {**plain["parallel"], "async_tensor": False}
    # A process for each: of a process group only one can ever be faked in a process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # importing takes as long as a simulation
    options: dict[str, Any] = {"mp_context": context, "max_tasks_per_child": 1}
    with ProcessPoolExecutor(min(AT_A_TIME, layout.pipeline), **options) as pool:
        plans: dict[int, RankPlan] = {}
        runs = _runs(DryRunConfig.model_validate({name: getattr(config, name) for name in plain}), layout)
        ends = sorted({rank for run in runs for rank in (run[0], run[-1])})
        for wanted in (ends, range(layout.pipeline)):
            _fill_between(plans, runs)
            missing = [rank for rank in wanted if rank not in plans]
            plans |= zip(missing, pool.map(partial(_plan_rank, plain, world, device), missing), strict=True)
    return [plans[rank] for rank in range(layout.pipeline)]


def _runs(config: DryRunConfig, layout: Layout) -> list[list[int]]:
    """Ranks in a row whose stages are alike: under 1f1b each has one micro-batch less under way than the one before."""
    stages = full_case(config, layout).layers
    ends = (0, layout.pipeline - 1)
    alike = config.parallel.schedule in layouts.SINGLE
    found: list[list[int]] = []
    for rank in range(layout.pipeline):
        if found and alike and not {rank, rank - 1} & {*ends} and stages[rank] == stages[rank - 1]:
            found[-1].append(rank)
        else:
            found.append([rank])
    return found


def _fill_between(plans: dict[int, RankPlan], runs: list[list[int]]) -> None:
    """Plans of ranks between two that are known and have their peak at the same moment."""
    for first, *between, last in (run for run in runs if len(run) > 2 and run[-1] in plans):
        if plans[first].moment == plans[last].moment:
            plans.update({rank: plans[first].towards(plans[last], rank) for rank in between})


def _plan_rank(plain: dict[str, Any], world: int, device: str, rank: int) -> RankPlan:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    return plan_rank(resolve(DryRunConfig, plain), world, rank, device=device)


def plan_rank(
    config: DryRunConfig, world: int, rank: int = 0, *, device: str = "cuda", extrapolate: bool = True
) -> RankPlan:
    """The plan of one process of the pipeline, in this process, whose process group it takes."""
    layout = config.parallel.layout(world)
    full = full_case(config, layout)
    with fake_world(world, rank * world // layout.pipeline, layout) as mesh:
        simulation = Simulation(config, mesh, device, [s for s in range(len(full.layers)) if _mine(s, config, rank)])
        seen = simulation.extrapolated(full) if extrapolate else simulation.run(full)
        return _rank_plan(simulation, seen, rank)


def _rank_plan(simulation: Simulation, seen: Seen, rank: int) -> RankPlan:
    totals: dict[Any, float] = defaultdict(float)
    for key, size in seen.amounts.items():
        if key[0] == "memory" and key[2] != HOST:
            totals[key[1]] += size
    peak = max(totals, key=lambda moment: totals[moment])
    categories, modules = defaultdict[str, float](float), defaultdict[str, float](float)
    for key, size in seen.amounts.items():
        if key[:2] == ("memory", peak) and key[2] != HOST:
            categories[key[2]] += size
            modules[key[3]] += size
    groups = simulation.groups()
    communication: dict[str, dict[str, float]] = {}
    for key, size in seen.amounts.items():
        if key[0] == "bytes" and size:
            communication.setdefault(groups.get(key[1], "other"), {})[key[2]] = size
    told = " ".join(map(str, peak))
    return RankPlan(rank, Footprint(**categories), dict(modules), told, seen.amounts["flops",], communication)


def _mine(stage: int, config: DryRunConfig, rank: int) -> bool:
    return process_of(stage, config.parallel) == rank
