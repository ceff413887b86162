"""Tiny models and batches that every rank builds alike, and what a step makes of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from harness import meshed, run
from torch import Tensor

from treadle.config import resolve
from treadle.data.dataset import Part, TokenDataset
from treadle.data.loader import Loader
from treadle.nn.transformer import TransformerConfig
from treadle.parallel.config import ParallelConfig
from treadle.parallel.context import own_part
from treadle.parallel.gradients import gradient_norm
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import own_parameters
from treadle.parallel.shards import Parts, copy_whole, gather, parts_of
from treadle.train.config import TrainingConfig
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import cross_entropy
from treadle.train.setup import build_model

VOCABULARY, EOS, LENGTH, ROWS = 64, 0, 16, 8
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2}
GATED = {"kind": "gated", "dim": 48}
MOE = {"kind": "moe", "experts": 6, "top_k": 2, "dim": 16, "balance_bias": 0.01, "z_loss": 0.001}
LATENT = {"kind": "latent_attention", "heads": 2, "kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "value_dim": 16}
NTK = {"kind": "dynamic_ntk", "factor": 4.0}
DELTA = {"kind": "gated_delta", "heads": 2, "head_dim": 16}


DENSE = {"kind": "dense", "dim": 48, "bias": True}
# One key-value head, and norms of all heads as one vector.
NORMED = {**ATTENTION, "kv_heads": 1, "qk_norm": {"kind": "layer"}, "qk_norm_over": "all"}


def layer(mixer: Any = None, feedforward: Any = None, repeat: int = 2) -> dict[str, Any]:
    return {
        "kind": "pre_norm",
        "repeat": repeat,
        "mixer": mixer or ATTENTION,
        "feedforward": feedforward or GATED,
    }


def spec(layers: list[dict[str, Any]] | None = None, **changes: Any) -> TransformerConfig:
    plain = {"dim": 32, "vocab_size": VOCABULARY, "max_length": 64, "layers": layers or [layer()]}
    return resolve(TransformerConfig, {**plain, **changes})


MODELS: dict[str, TransformerConfig] = {
    "plain": spec(),
    "tied": spec(tied=True),
    "moe": spec([layer(feedforward=MOE)]),
    "delta": spec([layer(DELTA), layer(repeat=1)]),
    "latent": spec([layer(LATENT, repeat=1), layer(repeat=1)]),
    "further": spec(multi_token={"kind": "sequential", "depth": 2, "weight": 0.3}),
    "heads": spec(
        [
            layer({**ATTENTION, "kv_heads": 4, "bias": True, "output_bias": True}, DENSE, 1),
            {**layer({**ATTENTION, "qk_norm": {"kind": "rms"}}, repeat=1), "kind": "sandwich"},
            {**layer(NORMED, repeat=1), "kind": "parallel", "norm": {"kind": "layer"}},
            {**layer({**NORMED, "qk_norm_over": "own", "sinks": True}, repeat=1), "kind": "post_norm"},
            {**layer({**ATTENTION, "position": {"kind": "alibi"}, "sinks": True}, repeat=1), "kind": "reordered_norm"},
        ],
        position={"kind": "learned"},
        embedding_norm={"kind": "layer"},
        softcap=3.0,
    ),
    "wide": spec(
        [
            {**layer({**ATTENTION, "qk_norm": {"kind": "rms"}, "qk_norm_over": "all"}, repeat=1), "kind": "parallel"},
            layer({**ATTENTION, "qk_norm": {"kind": "rms"}, "qk_norm_over": "own"}, repeat=1),
        ],
        position={"kind": "sinusoidal"},
        tied=True,
    ),
    "experts": spec(
        [
            layer({**LATENT, "q_rank": 16, "bias": True, "heads": 4}, {**MOE, "bias": True, "dim": 32}, 1),
            layer(None, {**MOE, "shared": DENSE, "shared_gate": True, "capacity": 1.25, "dim": 32}, 1),
        ]
    ),
    "grouped_delta": spec([layer({**DELTA, "value_heads": 4}, repeat=1)]),
    "facts": spec(
        [
            layer({**ATTENTION, "window": 5}, repeat=1),
            layer({**ATTENTION, "position": {"kind": "alibi"}, "sinks": True}, repeat=1),
            layer({**ATTENTION, "softcap": 5.0}, repeat=1),
        ]
    ),
    "slopes": spec([layer({**ATTENTION, "kv_heads": 4, "position": {"kind": "alibi"}, "sinks": True})]),
    "mqa": spec([layer({**ATTENTION, "kv_heads": 1})]),
    "lengths": spec(
        [layer({**ATTENTION, "position": {"kind": "rope", "scaling": {**NTK, "original_length": 5}}})],
        position={"kind": "learned"},
    ),
    "even": spec([layer(feedforward={**MOE, "balance_loss": 0.0})]),
    "sixteen": spec(  # halves of matrices are multiples of 16
        [
            layer({**ATTENTION, "bias": True, "output_bias": True}, {**DENSE, "dim": 64}, 1),
            layer(feedforward={**GATED, "dim": 64}, repeat=1),
        ]
    ),
    "deep": spec([layer(repeat=5)]),
    "deeper": spec([layer(repeat=9)]),
    "deep-tied": spec([layer(repeat=5)], tied=True),
    "deep-moe": spec(
        [
            layer(feedforward={**MOE, "bias": True}),
            layer(),
            layer(feedforward={**MOE, "compute": "loop", "capacity": 1.0}),
        ]
    ),
    "deep-mla": spec([layer({**LATENT, "q_rank": 16, "heads": 4}, repeat=5)], tied=True),
    "deep-even": spec(
        [
            layer(feedforward={**MOE, "balance_loss": 0.0}),
            layer(
                {**LATENT, "heads": 4},
                {**MOE, "balance_loss": 0.0, "bias": True, "shared": GATED, "shared_gate": True},
                repeat=3,
            ),
        ]
    ),
    "deep-heads": spec([layer({**ATTENTION, "kv_heads": 4, "position": {"kind": "alibi"}, "sinks": True}, repeat=5)]),
    "deep-mqa": spec([layer({**ATTENTION, "kv_heads": 1, "bias": True}, repeat=9)]),
    "deep-latent": spec([layer(LATENT, repeat=1), layer(DELTA, repeat=1), layer({**ATTENTION, "bias": True})]),
    "deep-further": spec(
        [layer(repeat=4)],
        tied=True,
        embedding_norm={"kind": "rms"},
        multi_token={"kind": "sequential", "depth": 2, "weight": 0.3},
    ),
    "odd": spec([layer(feedforward={"kind": "gated", "dim": 40})], dim=24 + 8, vocab_size=61),
    # Heads of 64, which the kernels of a GPU take.
    "gpu": spec([layer(feedforward={"kind": "gated", "dim": 512}, repeat=4)], dim=256, max_length=256),
    "gpu-latent": spec(
        [layer({**LATENT, "heads": 4, "kv_rank": 64, "nope_dim": 32, "rope_dim": 32, "value_dim": 64})],
        dim=256,
        max_length=256,
    ),
    "gpu-moe": spec(
        [layer(feedforward={**MOE, "experts": 4, "dim": 128, "balance_loss": 0.0})], dim=256, max_length=256
    ),
}


def training(**changes: Any) -> TrainingConfig:
    plain = {"steps": 4, "sequence_length": LENGTH, "batch_size": ROWS, "precision": "fp32", "compile": False}
    return TrainingConfig(**{**plain, **changes})


class Unended(TokenDataset):
    """Its documents end with EOS or without: those without leave an ignored target where they meet the next."""

    def ended(self, last: np.ndarray) -> np.ndarray:
        return last == EOS


def loader(mesh: Mesh, batch_size: int = ROWS, seed: int = 2, length: int = LENGTH) -> Loader:
    """Documents much shorter than a row, so that ranks have different numbers of targets."""
    generator = np.random.default_rng(seed)
    texts = [
        np.concatenate([generator.integers(1, VOCABULARY - 4, length), [EOS]])
        for length in generator.integers(1, 20, 200)
    ]
    texts = [text[:-1] if number % 5 < 3 else text for number, text in enumerate(texts)]
    offsets = np.cumsum([0, *(len(text) for text in texts)])
    part = Part("memory", np.concatenate(texts).astype(np.uint16), offsets)
    data = Unended("memory", [part], fingerprint="memory", vocab_size=VOCABULARY)
    return Loader(
        [data], sequence_length=length, batch_size=batch_size, seed=seed, rank=mesh.data_rank, world=mesh.data_size
    )


def step_of(
    model: str, mesh: Mesh, rows: int, parallel: ParallelConfig | None = None, **changes: Any
) -> dict[str, Any]:
    """Loss, metrics, gradients and their norm of one step, whole and on the CPU."""
    config = training(**changes)
    built = build_model(MODELS[model], config, seed=0, mesh=mesh, parallel=parallel)
    parts = parts_of(built)
    initial = {n: whole(p, parts.get(n, ())) for n, p in built.named_parameters()}
    vary(built)
    batches = loader(mesh, length=config.sequence_length).micro_batches(0, rows)
    result = forward_backward(built, batches, partial(cross_entropy, z_loss=1e-3), mesh=mesh)
    norm = gradient_norm(own_parameters(built), mesh)
    gradients = {n: whole(p.grad, parts.get(n, ())) for n, p in built.named_parameters() if p.grad is not None}
    return {
        "loss": result.loss.item(),
        "tokens": result.tokens,
        "here": sum(own_part(batch, mesh, "cpu").valid_tokens for batch in batches),
        "norm": norm.item(),
        "metrics": {name: value.item() for name, value in result.metrics.items()},
        "loads": {name: load.counts_E.cpu() for name, load in result.loads.items()},
        "gradients": gradients,
        "initial": initial,
    }


def vary(model: torch.nn.Module) -> None:
    """Give biases, norms and other vectors, which start alike, values of their own."""
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "sinks" in name:
            values = whole(parameter, parts.get(name, ()))
            generator = torch.Generator().manual_seed(len(name))
            values += 0.2 * torch.randn(values.shape, generator=generator)
            copy_whole(parameter, values, parts.get(name, ()))


def whole(tensor: Tensor, parts: Parts = ()) -> Tensor:
    return gather(tensor.detach(), parts).cpu().clone()


@dataclass(frozen=True)
class Case:
    """A step to be made on so many ranks. sizes: of the mesh; what they leave is sharded. rows: of a micro-batch.
    options: further keys of `parallel`. training: of the training section."""

    model: str
    ranks: int
    sizes: dict[str, Any]
    rows: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def steps(cases: dict[str, Case]) -> Callable[[str], list[dict[str, Any]]]:
    """What each rank has found, by the name of the case. Those with as many ranks are stepped one after the other by
    the same processes, when one of them is first asked for: starting processes takes longer than a step."""

    @cache
    def by_ranks(ranks: int) -> list[Any]:
        chosen = {name: case for name, case in cases.items() if case.ranks == ranks}
        return run(_steps, ranks, chosen, seconds=60 + 10 * len(chosen))

    return lambda name: [found[name] for found in by_ranks(cases[name].ranks)]


def _steps(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    found = {}
    with meshed():
        for name, case in cases.items():
            try:
                sizes, options = case.sizes, {**case.sizes, **case.options}
                found[name] = step_on_ranks(case.model, case.rows, options, sizes, **case.training)
            except Exception as error:
                error.add_note(f"in case {name}")
                raise
    return found


@cache
def alone(model: str, rows: int) -> dict[str, Any]:
    """The same step by one process."""
    return step_of(model, Mesh(), rows)


def step_on_ranks(model: str, rows: int, options: dict[str, Any], sizes: dict[str, Any], **changes: Any) -> Any:
    with meshed(**sizes) as mesh:
        return step_of(model, mesh, rows, ParallelConfig(**options), **changes)


def together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the stages hold, as one. What several of them hold must be the same."""
    whole = {**found[0], "gradients": {}, "initial": {}}
    for step in found:
        for part in ("gradients", "initial"):
            for name, values in step[part].items():
                assert torch.equal(whole[part].setdefault(name, values), values), name
        for key in ("loss", "norm", "tokens", "metrics"):
            assert step[key] == found[0][key], key
        assert step["loads"].keys() == found[0]["loads"].keys()
    return whole


def without_balance(step: dict[str, Any]) -> dict[str, Any]:
    """Where rows are cut, balance losses are of each rank's part, as they are of each micro-batch."""
    return {**step, "metrics": {name: value for name, value in step["metrics"].items() if name != "balance_loss"}}


def assert_same_step(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert found["tokens"] == expected["tokens"]
    assert found["initial"].keys() == expected["initial"].keys()
    for name, values in expected["initial"].items():
        assert torch.equal(found["initial"][name], values), f"{name} starts otherwise"
    assert abs(found["loss"] - expected["loss"]) < tolerance
    assert abs(found["norm"] - expected["norm"]) < tolerance * max(1.0, expected["norm"])
    for name, value in expected["metrics"].items():
        assert abs(found["metrics"][name] - value) < 10 * tolerance, name
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, grad in expected["gradients"].items():
        error = (found["gradients"][name] - grad).abs().max().item()
        assert error < tolerance, f"{name}: {error:.2e}"
    for name, counts in expected["loads"].items():
        assert torch.equal(found["loads"][name], counts), name
