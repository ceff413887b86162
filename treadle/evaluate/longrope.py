"""LongRoPE's search (Ding et al. 2024, arXiv:2402.13753): rotary divisors for a longer context, without training.

The paper's evolutionary search, small: divisors start from interpolation, NTK-aware and YaRN-like ones, the best of a
generation are mutated and crossed, and they never fall with the wavelength. What it does not search is the number of
first tokens that keep their positions.

J number of frequencies.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.random import Generator

from treadle.config import resolve, to_dict
from treadle.data.packing import Batch
from treadle.errors import ConfigError
from treadle.nn.position import Rope
from treadle.nn.rope_scaling import LongRopeScalingConfig, RopeScalingConfig
from treadle.nn.store import build_meta
from treadle.nn.transformer import Transformer, TransformerConfig

PARENTS, CHANGED = 4, 0.3  # of a generation, those that go on; the share of divisors that a mutation changes


def with_scaling(model: Transformer, scaling: RopeScalingConfig) -> Transformer:
    """The same weights under another scaling of every rotary embedding. Raises ConfigError if there is none."""
    if not any(isinstance(module, Rope) for module in model.modules()):
        raise ConfigError("the model has no rotary positions to scale; train one with `position: rope`")
    override = f"**.position.scaling={scaling.model_dump_json(exclude_none=True)}"
    spec = resolve(TransformerConfig, to_dict(model.config), [override])
    scaled = build_meta(spec)
    scaled.load_state_dict(model.state_dict(), assign=True)
    scaled.tie()
    scaled.dtype = model.dtype
    return scaled.train(model.training)


def search_divisors(
    model: Transformer,
    batches: Sequence[Batch],
    *,
    original_length: int,
    generations: int = 5,
    population: int = 12,
    seed: int = 0,
    attention: str = "auto",
) -> LongRopeScalingConfig:
    """The scaling that predicts `batches` best: rows of text that the model was trained on, of the length to reach."""
    found = {m.rotated // 2 for m in model.modules() if isinstance(m, Rope)}
    if len(found) != 1:
        raise ConfigError(
            f"divisors are searched for one number of rotary frequencies; the model's layers have {found or 'none'}"
        )
    (J,) = found
    length = batches[0].tokens_BS.shape[1]
    factor, generator = length / original_length, np.random.default_rng(seed)

    def scaling(divisors_J: np.ndarray) -> LongRopeScalingConfig:
        long = [round(float(divisor), 4) for divisor in divisors_J]
        return LongRopeScalingConfig(
            short_factor=[1.0] * J, long_factor=long, original_length=original_length, factor=factor
        )

    def nats(divisors_J: np.ndarray) -> float:
        return total_nats(with_scaling(model, scaling(divisors_J)), batches, attention)

    best = evolve(nats, beginnings(J, factor), factor, generator, generations, population)
    return scaling(best)


@torch.no_grad()
def total_nats(model: Transformer, batches: Sequence[Batch], attention: str) -> float:
    device = model.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        here = batch.to(device)
        hidden_BSD = model.hidden(here.tokens_BS, replace(here.context, backend=attention))
        total += model.head.cross_entropy(hidden_BSD, here.targets_BS)
    return float(total)


def beginnings(J: int, factor: float) -> list[np.ndarray]:
    """No change; interpolation (arXiv:2306.15595); NTK-aware; and three ramps between none and interpolation."""
    j = np.arange(J)
    ramps = [1 + (factor - 1) * np.clip((j / J - low) / (high - low), 0, 1) for low, high in RAMPS]
    return [np.ones(J), np.full(J, factor), factor ** (j / max(1, J - 1)), *ramps]


RAMPS = (0.0, 0.5), (0.25, 0.75), (0.5, 1.0)


def evolve(
    cost: Callable[[np.ndarray], float],
    candidates: list[np.ndarray],
    factor: float,
    generator: Generator,
    generations: int,
    population: int,
) -> np.ndarray:
    """The candidate of least cost after some generations; the best of one always go on to the next."""
    scored = sorted(((cost(c), n, c) for n, c in enumerate(candidates)), key=lambda item: item[:2])
    for generation in range(generations):
        parents = [candidate for _, _, candidate in scored[:PARENTS]]
        children = [child(parents, factor, generator) for _ in range(population)]
        start = len(candidates) + generation * population
        scored += [(cost(c), start + n, c) for n, c in enumerate(children)]
        scored.sort(key=lambda item: item[:2])
    return scored[0][2]


def child(parents: list[np.ndarray], factor: float, generator: Generator) -> np.ndarray:
    """A cross of two parents, some divisors of it changed by up to a half, in [1, 1.25 factor], not falling."""
    first, second = (parents[i] for i in generator.integers(len(parents), size=2))
    mixed = np.where(generator.random(len(first)) < 0.5, first, second)
    changed = generator.random(len(first)) < CHANGED
    mixed = np.where(changed, mixed * np.exp(generator.uniform(-0.5, 0.5, len(first))), mixed)
    return np.maximum.accumulate(np.clip(mixed, 1.0, 1.25 * factor))
