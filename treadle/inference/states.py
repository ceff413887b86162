"""Hidden states out of the engine: those of named modules for each token, and one vector for a whole text.

T tokens of a step, D width of a module's output.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from treadle.config.base import nearest
from treadle.errors import ConfigError
from treadle.inference.request import Request

POOLED = ""  # in place of a module's name: the vector of the whole prompt


class Taps:
    """Copies what named modules return into buffers that stay where they are, so that a captured step fills them too.

    A module is tapped while some request asks for it.
    """

    def __init__(self, model: nn.Module, budget: int):
        """budget: tokens of a step at most."""
        self._modules, self._budget = dict(model.named_modules()), budget
        self._wanted: Counter[str] = Counter()
        self._hooks: dict[str, Any] = {}
        self._buffers: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}  # how many of a buffer's are of the last step

    def open(self, names: Sequence[str]) -> None:
        """Raises ConfigError for what is no module of the model."""
        if unknown := [name for name in names if name not in self._modules]:
            close = nearest(unknown[0], [name for name in self._modules if name.count(".") < 3])
            raise ConfigError(f"taps: the model has no module '{unknown[0]}'.{close}")
        for name in names:
            self._wanted[name] += 1
            if name not in self._hooks:
                self._hooks[name] = self._modules[name].register_forward_hook(self._hook(name))

    @property
    def active(self) -> bool:
        """Whether some module is tapped. A step captured by now would write to the buffers when they are gone."""
        return bool(self._hooks)

    def close(self, names: Sequence[str]) -> None:
        for name in names:
            self._wanted[name] -= 1
            if not self._wanted[name]:
                self._hooks.pop(name).remove()
                self._buffers.pop(name, None)
                self._rows.pop(name, None)

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, given: Any, made: Any) -> None:
            x_TD = (made[0] if isinstance(made, tuple) else made).flatten(0, -2)
            self._rows[name] = len(x_TD)
            if name not in self._buffers:
                self._buffers[name] = x_TD.new_zeros(self._budget, x_TD.shape[-1])
            self._buffers[name][: len(x_TD)] = x_TD

        return keep

    def found(self, request: Request, begin: int, end: int, x_TD: Tensor) -> dict[str, Tensor]:
        """What a request asks for, of tokens begin ... end of the step that has just been queued.

        x_TD: what the head reads. Raises ConfigError for a module that does not return a row for each token.
        """
        if wrong := [name for name in request.taps if self._rows.get(name) != len(x_TD)]:
            raise ConfigError(f"taps: '{wrong[0]}' does not return a row for each token of a step; tap a layer")
        kept = {name: self._buffers[name][begin:end].clone() for name in request.taps}
        if request.sampling.pooling == "last":
            kept[POOLED] = x_TD[end - 1].float()
        elif request.sampling.pooling == "mean":
            kept[POOLED] = x_TD[begin:end].float().sum(0) / len(request.prompt)
        return kept


def collect(request: Request, begin: int, found: dict[str, Tensor]) -> None:
    """Add what a step has found, of the tokens from `begin` on. After a preemption they come again."""
    for name, x in found.items():
        if name == POOLED:
            alone = begin == 0 or request.sampling.pooling == "last"
            request.hidden[name] = x if alone else request.hidden[name] + x
            continue
        if name not in request.hidden:
            most = len(request.prompt) + request.sampling.max_tokens
            request.hidden[name] = x.new_zeros(most, x.shape[-1])
        known = request.hidden[name][begin : begin + len(x)]
        known.copy_(x[: len(known)])


def cut(request: Request) -> None:
    """Cut what was collected to the tokens that went through the model: all but the last. An abort leaves nothing."""
    if request.finish == "abort":
        request.hidden.clear()
    size = len(request.prompt) + max(len(request.outputs) - 1, 0)
    for name in request.taps:
        if name in request.hidden:
            request.hidden[name] = request.hidden[name][:size]


def embedding(pooled_D: Tensor, dimensions: int | None = None) -> Tensor:
    """A vector of length 1, of the first `dimensions` numbers (Kusupati et al. 2022, arXiv:2205.13147)."""
    if dimensions is not None and dimensions > len(pooled_D):
        raise ConfigError(f"dimensions: {dimensions} is more than the model's {len(pooled_D)}")
    return nn.functional.normalize(pooled_D[:dimensions], dim=0)
