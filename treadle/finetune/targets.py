"""Which modules of a model a configuration means: name patterns, and what can be had where."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from treadle.config.base import nearest
from treadle.errors import ConfigError
from treadle.finetune.config import FinetuneConfig
from treadle.nn.linear import GroupedLinear, Linear
from treadle.nn.roles import feature_matrices

WHOLE = "all"  # the name of the one part of a layer that has none
Targets = dict[str, dict[str, int]]  # rank by path and part

GROUPED = {"lora"}  # methods that experts can have


def select(model: nn.Module, config: FinetuneConfig) -> Targets:
    """The targets in a whole model, which may be on the meta device.

    Raises ConfigError for a pattern that hits nothing, a rank that is more than a matrix has, or a method that the
    module cannot have.
    """
    known = dict(_blocks(model) if config.method == "adapter" else _matrices(model, config.method))
    everything = {path for path, _ in model.named_modules() if path} | set(known)
    found: Targets = {}
    for pattern, rank in config.ranks.items():
        matches = _regex(pattern).fullmatch
        names = [name for name in known if matches(name) or matches(known[name][0])]
        if not names:
            raise ConfigError(
                f"finetune.targets: '{pattern}' {_why_nothing(pattern, known, everything, config.method)}"
            )
        for name in names:
            path, part, limit = known[name]
            if rank > limit:
                raise ConfigError(f"finetune.targets: rank {rank} of '{pattern}' is more than {name} has: {limit}")
            found.setdefault(path, {})[part] = rank
    return found


def trainable(model: nn.Module, config: FinetuneConfig) -> set[str]:
    """The names of further weights that are trained. Raises ConfigError for a pattern that hits nothing."""
    names, chosen = [name for name, _ in model.named_parameters()], set()
    for pattern in config.trainable:
        fits = re.compile(f"{_regex(pattern).pattern}(\\..+)?").fullmatch
        hit = {name for name in names if fits(name)}
        if not hit:
            raise ConfigError(f"finetune.trainable: '{pattern}' fits no weight.{nearest(pattern, names)}")
        chosen |= hit
    return chosen


def _blocks(model: nn.Module) -> Iterator[tuple[str, tuple[str, str, int]]]:
    """What a bottleneck can stand after or beside: mixers and feed-forwards."""
    for path, module in model.named_modules():
        if re.fullmatch(r"layers\.\d+\.(mixer|feedforward)", path) and module is not None:
            yield path, (path, WHOLE, int(model.config.dim))  # type: ignore[union-attr,arg-type]


def _matrices(model: nn.Module, method: str) -> Iterator[tuple[str, tuple[str, str, int]]]:
    """Each matrix, or part of it, that maps features to features: its name, and path, part and largest rank."""
    inside = feature_matrices(model)
    wide = {inner for m in model.modules() if getattr(m, "full_precision", False) for inner in m.modules()}
    for path, module in model.named_modules():
        if not isinstance(module, Linear | GroupedLinear) or f"{path}.weight" not in inside or module in wide:
            continue
        if isinstance(module, GroupedLinear) and method not in GROUPED:
            continue
        outputs, inputs = module.weight.shape[-2:]
        for part, rows in (module.parts or {WHOLE: outputs}).items():
            yield f"{path}.{part}" if module.parts else path, (path, part, 1 if method == "ia3" else min(rows, inputs))


def _why_nothing(pattern: str, known: Iterable[str], everything: Iterable[str], method: str) -> str:
    hit = sorted(name for name in everything if _regex(pattern).fullmatch(name))
    if hit:
        return f"fits {hit[0]}, which cannot have {method}.{nearest(pattern, known)}"
    return f"fits no module.{nearest(pattern, _patterns(known))}"


def _patterns(names: Iterable[str]) -> set[str]:
    """With stars for numbers, as one would write them."""
    return {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}


def _regex(pattern: str) -> re.Pattern[str]:
    words = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"**": ".*", "*": r"[^.]*"}.get(word, re.escape(word)) for word in words))
