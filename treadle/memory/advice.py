"""What would make a run fit, and what it costs."""

from collections.abc import Iterator
from itertools import chain, combinations
from typing import Any

from pydantic import ValidationError

from treadle.errors import ConfigError
from treadle.memory.analytic import Setting
from treadle.memory.plan import Plan
from treadle.memory.predict import check, plan_of
from treadle.memory.search import MODES, Found, changed

Changes = dict[str, dict[str, Any]]


def cheapest(setting: Setting, count: int = 3) -> list[Found]:
    """The changes that make a run fit at the least cost in time, cheapest first: single ones, else pairs of them."""
    singles = list(_singles(setting))
    fitting = [found for changes in singles if (found := _tried(setting, changes)) is not None]
    if len(fitting) < count:
        both = [_together(*pair) for pair in combinations(singles, 2)]
        fitting += [found for changes in both if changes and (found := _tried(setting, changes)) is not None]
    fitting.sort(key=lambda found: (found.plan.time.total, len(found.overrides())))
    kept: list[Found] = []
    for found in fitting:  # a pair that contains a change which is enough by itself says nothing new
        if not any(set(other.overrides()) <= set(found.overrides()) for other in kept):
            kept.append(found)
    return kept[:count]


def _singles(setting: Setting) -> Iterator[Changes]:
    """Changes of one idea each that can save memory."""
    training, layout = setting.training, setting.layout
    now = training.activation_checkpointing
    for mode in MODES[MODES.index(now) + 1 if now in MODES else 1 :]:
        yield {"training": {"activation_checkpointing": mode}}
    rows = setting.rows
    for fewer in (rows // 2, rows // 4, 1):
        if 0 < fewer < rows:
            yield {"training": {"micro_batch_size": fewer}}
    free: dict[str, Any] = {"shard": None}  # what is left over shares the weights
    for key in ("tensor", "context", "pipeline", "expert"):
        now = getattr(layout, key)
        for size in (2 * now, 4 * now, 8 * now):
            if size <= setting.world:
                yield {"parallel": {key: size, **(free if setting.parallel.shard is not None else {})}}
    if layout.replicate > 1:
        yield {"parallel": {"replicate": 1, **free}}
    if setting.sharded and not setting.freed:
        yield {"parallel": {"reshard": "after_forward"}}
    if not setting.parallel.cpu_offload and setting.world > 1:
        yield {"parallel": {"cpu_offload": True}}


def _together(first: Changes, second: Changes) -> Changes | None:
    """Both changes, unless they are of the same key."""
    sections = {name: (first.get(name, {}), second.get(name, {})) for name in chain(first, second)}
    if any((a.keys() & b.keys()) - {"shard"} for a, b in sections.values()):
        return None
    return {name: a | b for name, (a, b) in sections.items()}


def _tried(setting: Setting, changes: Changes) -> Found | None:
    try:
        tried = changed(setting, changes)
        check(tried)
        plan: Plan = plan_of(tried)
    except (ConfigError, ValidationError):
        return None
    return Found(changes, plan) if plan.verdict == "fits" else None
