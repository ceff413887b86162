"""What a model takes to be served, before it is: the memory by the engine's own arithmetic, speed by roofline.

A step that draws one token for each of B requests reads all weights once (of experts those that somebody chose), and
every request's cache. The roofline is what the hardware allows; the host's part of a step is not in it.
"""

from dataclasses import dataclass
from typing import Any

from treadle.errors import ConfigError
from treadle.inference.engine import WORKSPACE, EngineConfig, longest, page_counts
from treadle.inference.runner import windows_of
from treadle.inference.tables import Tables
from treadle.memory.devices import Device
from treadle.memory.plan import GIB
from treadle.nn.flops import active_parameter_count, forward_flops, parameter_count, state_elements
from treadle.nn.linear import GroupedLinear
from treadle.nn.store import build_meta
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.train.setup import DTYPES


@dataclass(frozen=True)
class ServingPlan:
    """Bytes on the device; requests: of `length` tokens each that run at the same time; tokens per second: of one
    request alone, of all of them together, each at its full length, and of prompts."""

    memory: float
    weights: float
    cache: float
    workspace: float
    overhead: float
    cache_tokens: int
    length: int
    requests: int
    alone: float
    together: float
    prompts: float


def plan_serving(
    spec: TransformerConfig, device: Device, config: EngineConfig | None = None, *, length: int | None = None
) -> ServingPlan:
    """A model in bf16 on one device. length: tokens of a request, prompt and answer; None: the longest that the engine
    takes. Raises ConfigError where the model, or one request beside it, does not fit.
    """
    config = config or EngineConfig()
    model = build_meta(spec)
    model.dtype = DTYPES["bf16"]
    length = min(length or longest(model, config), longest(model, config))
    total, overhead = device.memory_gib * GIB, device.context_gib * GIB
    weights = float(parameter_count(model) * model.dtype.itemsize)
    if weights > config.memory * total - overhead:
        raise ConfigError(
            f"the weights take {weights / GIB:.1f} GiB in bf16, and memory={config.memory} gives them and the cache "
            f"{config.memory * total / GIB - device.context_gib:.1f} GiB of {device.name}; take a larger device"
        )
    counts = page_counts(model, config, (total - overhead - weights, total))
    windows = windows_of(model)
    requests = Tables(windows, counts, config.page, reuse=False).together(length, config.slots)
    cache = sum(
        # One page and one slot more take what padding writes.
        mixer.cache_elements() * model.dtype.itemsize * config.page * (counts[windows.index(mixer.facts.window)] + 1)
        for mixer in _mixers(model)
        if mixer.cache_elements()
    )
    cache += 4 * (config.slots + 1) * state_elements(model)
    step = Step(model, device)
    return ServingPlan(
        *(total, weights, cache, WORKSPACE, overhead),
        cache_tokens=max((count * config.page for count in counts), default=0),
        length=length,
        requests=requests,
        alone=1 / step.seconds(1, length),
        together=requests / step.seconds(requests, length),
        prompts=step.prompts(length),
    )


class Step:
    """The time of one step of a model on a device, at best."""

    def __init__(self, model: Transformer, device: Device):
        self.model, self.device = model, device
        grouped = [module for module in model.modules() if isinstance(module, GroupedLinear)]
        self.experts = [(m.weight.numel(), m.active / m.experts) for m in grouped]
        # A tied embedding is the head, which is read; of another a row.
        aside = [] if model.multi_token is None else list(model.multi_token.parameters())
        aside += [] if model.config.tied else [model.embedding.weight]
        self.read = parameter_count(model) - sum(p.numel() for p in aside) - sum(count for count, _ in self.experts)
        self.active = active_parameter_count(model) - sum(p.numel() for p in aside)

    def seconds(self, requests: int, length: int) -> float:
        """requests: that get a token each, and see `length` tokens."""
        w, bandwidth = self.model.dtype.itemsize, self.device.bandwidth_tbs * 1e12
        chosen = sum(count * (1 - (1 - share) ** requests) for count, share in self.experts)
        flops = 2 * self.active * requests
        weights = max(w * (self.read + chosen) / bandwidth, flops / (self.device.matmul_tflops * 1e12))
        kept = 0.0
        for mixer in _mixers(self.model):
            seen = min(length, getattr(getattr(mixer, "facts", None), "window", None) or length)
            kept += w * mixer.cache_elements() * seen
        states = 2 * 4 * state_elements(self.model)  # read, and written
        return weights + requests * (kept + states) / bandwidth

    def prompts(self, length: int) -> float:
        """Tokens per second that are read in, in rows of `length`."""
        mixing = sum(mixer.mixing_flops(length) for mixer in _mixers(self.model) if hasattr(mixer, "mixing_flops"))
        head = forward_flops(self.model.head, length)  # of the last token alone
        matmuls = forward_flops(self.model, length) - mixing - head
        narrow = all(max(getattr(mixer, "head_dims", (128,))) <= 64 for mixer in _mixers(self.model))
        rate = self.device.attention_64_tflops if narrow else self.device.attention_tflops
        return 1 / (matmuls / (self.device.matmul_tflops * 1e12) + mixing / (rate * 1e12))


def _mixers(model: Transformer) -> list[Any]:
    layers: Any = model.layers
    return [layer.mixer for layer in layers.values()]
