"""Which models can be cut between how many processes: the sizes that have to divide, read off a model's blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from treadle.nn.linear import GroupedLinear
from treadle.nn.roles import parameter_roles
from treadle.nn.store import build_meta
from treadle.nn.transformer import TransformerConfig

LARGEST = 64  # processes that are tried for what would fit


@dataclass(frozen=True)
class Size:
    """A number that processes share equally. shareable: or that divides their number, each being shared by some."""

    name: str
    count: int
    shareable: bool = False

    def fits(self, processes: int) -> bool:
        return self.count % processes == 0 or (self.shareable and processes % self.count == 0)


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that are cut, by path: the outermost ones that have columns and rows."""
    found: list[str] = []
    for path, module in model.named_modules():
        roles = set(getattr(module, "roles", {}).values())
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        if roles & {"column", "expert"} and roles & {"row", "expert"}:
            found.append(path)
            yield path, module


def misfit(config: TransformerConfig, processes: int) -> tuple[Size, list[int]] | None:
    """The first size of the model that cannot be shared, and numbers of processes for which all can."""
    spec = config if config.vocab_size is not None else config.model_copy(update={"vocab_size": 64})
    sizes = list(_sizes(build_meta(spec)))
    if config.vocab_size is not None:
        sizes.append(Size("vocab_size", config.vocab_size))
    for size in sizes:
        if not size.fits(processes):
            return size, [n for n in range(1, LARGEST + 1) if all(other.fits(n) for other in sizes)]
    return None


def _sizes(model: nn.Module) -> Iterator[Size]:
    """Head counts before sizes of matrices, which mostly follow from them."""
    found: Any = list(blocks(model))
    for path, block in found:
        for attribute, parts in getattr(block, "head_counts", {}).items():
            yield Size(f"{path}.{attribute}", getattr(block, attribute), bool(parts))
    roles = parameter_roles(model)
    for path, block in found:
        for inner, module in block.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                name = ".".join(filter(None, (path, inner, leaf)))
                role = module.alone if isinstance(module, GroupedLinear) else roles[name]
                if role == "column":
                    parts = getattr(module, "parts", {}) or {"": parameter.shape[isinstance(module, GroupedLinear)]}
                    yield from (Size(f"{name} {part}".strip(), rows) for part, rows in parts.items())
                elif role == "row" and leaf == "weight":
                    yield Size(f"{name} inputs", parameter.shape[-1])
