"""All the ways to run a recipe on so many devices, and the fastest of those that fit."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from treadle.config import Config
from treadle.errors import ConfigError
from treadle.memory.analytic import Setting
from treadle.memory.plan import GIB, TIGHT, Plan
from treadle.memory.predict import check, plan_of
from treadle.memory.roofline import step_time
from treadle.nn.moe import MoEConfig
from treadle.parallel.activation_checkpointing import CheckpointingConfig, FullConfig, NoneConfig, SelectiveConfig
from treadle.parallel.config import ZERO_BUBBLE, ParallelConfig
from treadle.parallel.fits import misfit
from treadle.train.config import TrainingConfig

SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv")
ROWS = (1, 2, 4, 8)  # of a micro-batch
MODES: tuple[CheckpointingConfig, ...] = (NoneConfig(), SelectiveConfig(), FullConfig())


@dataclass(frozen=True)
class Found:
    """A way to run, as changes to the recipe by section and key, and what it takes."""

    changes: dict[str, dict[str, Any]]
    plan: Plan

    def overrides(self) -> list[str]:
        pairs = [(f"{name}.{key}", value) for name, keys in self.changes.items() for key, value in keys.items()]
        return [f"{key}={_word(value)}" for key, value in pairs]


def search(setting: Setting, count: int = 10) -> list[Found]:
    """The fastest that fit, fastest first; the recipe's global batch and sequence length stay as they are.

    Every one is predicted in closed form, its time first: memory is looked at only where that is good enough.
    """
    best: list[tuple[float, int, Setting, dict[str, Any]]] = []  # a heap, its slowest first
    room = TIGHT * setting.device.memory_gib * GIB
    for number, (tried, changes) in enumerate(_ways(setting)):
        if min(rank.own for rank in tried.ranks) * 4 > room:
            continue
        speed = 1 / step_time(tried).total
        # Twice as many as asked for: a few may be refused below.
        if len(best) == 2 * count and speed <= best[0][0]:
            continue
        if max(rank.footprint().total for rank in tried.ranks) <= room:
            add = heapq.heappush if len(best) < 2 * count else heapq.heapreplace
            add(best, (speed, -number, tried, changes))
    found: list[Found] = []
    for _, _, tried, changes in sorted(best, key=lambda item: item[:2], reverse=True):
        if len(found) < count and _possible(tried):
            found.append(Found(changes, plan_of(tried)))
    return found


def changed(setting: Setting, changes: dict[str, dict[str, Any]]) -> Setting:
    """The same recipe with other values of some keys. Raises ValueError where one is impossible by itself."""
    training = TrainingConfig.model_validate(dict(setting.training) | changes.get("training", {}))
    parallel = ParallelConfig.model_validate(dict(setting.parallel) | changes.get("parallel", {}))
    return replace(setting, training=training, parallel=parallel)


def _possible(setting: Setting) -> bool:
    try:
        check(setting)
    except ConfigError:
        return False
    return True


def _ways(setting: Setting) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Those that can be told to be possible without building the model."""
    model, world, batch = setting.model, setting.world, setting.training.batch_size
    layers, length = len(model.expand()), setting.training.sequence_length
    feedforwards = [getattr(layer, "feedforward", None) for layer in model.expand()]
    experts = {part.experts for part in feedforwards if isinstance(part, MoEConfig)}
    near = _powers(min(world, setting.device.per_node))
    tensors = [n for n in near if n == 1 or misfit(model, n) is None]
    pipelines = [n for n in _powers(min(world, layers)) if world % n == 0]
    contexts = [n for n in _powers(16) if length % (2 * n) == 0 and (n == 1 or length // n >= 8192)]
    base: dict[str, Any] = {"stages_per_process": None, "stage_layers": None, "async_tensor": False, "reshard": "auto"}
    for pipeline, tensor, context in product(pipelines, tensors, contexts):
        data, rest = divmod(world, pipeline * tensor * context)
        if rest or data == 0 or batch % data or (context > 1 and pipeline > 1):
            continue
        rows = batch // data
        for replicate, expert in product((1, 2, 4, 8, 16), _powers(64) if experts else (1,)):
            shard, uneven = divmod(data, replicate)
            # A copy that is less than a machine is not looked at, nor experts that do not divide.
            if uneven or (replicate > 1 and shard * tensor * context < setting.device.per_node):
                continue
            if shard * context % expert or any(number % expert for number in experts):
                continue
            for schedule, at_a_time, mode in product(SCHEDULES if pipeline > 1 else ("1f1b",), ROWS, MODES):
                if rows % at_a_time or (pipeline > 1 and rows // at_a_time < pipeline):
                    continue
                if schedule in ZERO_BUBBLE and (tensor > 1 or expert > 1):
                    continue
                if schedule != "1f1b" and 2 * pipeline > layers:
                    continue
                sizes = {"pipeline": pipeline, "replicate": replicate, "shard": shard, "context": context}
                sizes |= {"tensor": tensor, "expert": expert}
                cut = {**base, **sizes, **({"schedule": schedule} if pipeline > 1 else {})}
                loop = {"micro_batch_size": at_a_time, "activation_checkpointing": mode}
                parallel = setting.parallel.model_copy(update=cut)
                training = setting.training.model_copy(update=loop)
                changes = {"parallel": _unlike(setting.parallel, cut), "training": _unlike(setting.training, loop)}
                yield replace(setting, parallel=parallel, training=training), changes


def _unlike(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if getattr(config, key) != value}


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


def _word(value: Any) -> str:
    if isinstance(value, CheckpointingConfig):
        return str(getattr(value, "kind", ""))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
