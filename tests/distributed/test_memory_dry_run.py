"""A dry run against what a run over gloo really allocates, by PyTorch's profiler."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_zoo import MOE, layer, spec
from harness import meshed, run
from torch.profiler import ProfilerActivity, profile

from treadle.attention import AttentionContext
from treadle.config import to_dict
from treadle.data.packing import Batch
from treadle.errors import ConfigError
from treadle.memory.dry_run import DryRunConfig, dry_run, plan_rank
from treadle.memory.live import local
from treadle.parallel.gradients import clip_factor, gradient_norm, scale_gradients
from treadle.parallel.pipeline import own_parameters
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import cross_entropy
from treadle.train.setup import build_model, build_state

ATTENTION = {"kind": "attention", "heads": 8, "kv_heads": 4}
WIDE = layer(ATTENTION, {"kind": "gated", "dim": 384}, repeat=4)
MIXED = layer(ATTENTION, {**MOE, "experts": 4, "dim": 128, "balance_bias": None}, repeat=4)
MODELS = {
    name: spec([one], dim=128, vocab_size=1024, max_length=256) for name, one in (("dense", WIDE), ("moe", MIXED))
}


def config_of(model: str, sizes: dict[str, Any], changes: dict[str, Any]) -> DryRunConfig:
    training = {"steps": 3, "sequence_length": 128, "batch_size": 8, "compile": False, **changes}
    return DryRunConfig.model_validate({"model": to_dict(MODELS[model]), "training": training, "parallel": sizes})


def measured(model: str, sizes: dict[str, Any], changes: dict[str, Any]) -> float:
    """Bytes that this process holds at the peak of a step."""
    warnings.filterwarnings("ignore")
    config = config_of(model, sizes, changes)
    training = config.training
    with meshed(**sizes) as mesh:
        built = build_model(config.model, training, seed=0, mesh=mesh, parallel=config.parallel)
        state = build_state(built, config.optimizer, training)
        rows, each = min(training.rows, training.batch_size // mesh.data_size), training.batch_size // mesh.data_size
        batches = []
        for _ in range(each // rows):
            tokens_BS = torch.randint(0, 1024, (rows, 128))
            context, samples_B = AttentionContext.causal(rows, 128), torch.zeros(rows, dtype=torch.int64)
            batches.append(Batch(tokens_BS, tokens_BS.clone(), context, rows * 128, samples_B, samples_B))

        def step() -> None:
            forward_backward(built, batches, cross_entropy, mesh=mesh)
            norm = gradient_norm(own_parameters(built), mesh)
            scale_gradients(built.parameters(), clip_factor(1.0, norm))
            for optimizer in state.optimizers.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        step()
        step()
        gc.collect()
        states = [s for o in state.optimizers.optimizers for each in o.state.values() for s in each.values()]
        held = {local(t).untyped_storage().data_ptr(): local(t) for t in [*built.parameters(), *states]}
        static = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
        # The least of a few: what travels over gloo is let go by another thread, sooner or later.
        return static + min(allocated(step) for _ in range(3))


def allocated(step: Callable[[], None]) -> int:
    """The most that a step holds beside what was there before it, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def planned(model: str, sizes: dict[str, Any], changes: dict[str, Any], world: int, rank: int, **how: Any) -> Any:
    warnings.filterwarnings("ignore")
    return plan_rank(config_of(model, sizes, changes), world, rank, device="cpu", **how)


@pytest.mark.parametrize(
    ("model", "world", "sizes", "changes"),
    [
        ("dense", 1, {}, {}),
        ("dense", 2, {}, {}),
        ("dense", 2, {}, {"activation_checkpointing": "full"}),
        ("dense", 2, {"tensor": 2}, {}),
        ("dense", 2, {"pipeline": 2}, {"micro_batch_size": 2}),
        ("dense", 2, {"pipeline": 2, "schedule": "interleaved_1f1b"}, {"micro_batch_size": 2}),
        ("moe", 2, {}, {}),
    ],
    ids=["alone", "fsdp", "full", "tensor", "1f1b", "interleaved", "moe"],
)
def test_planned_peak_is_the_measured_one(
    model: str, world: int, sizes: dict[str, Any], changes: dict[str, Any]
) -> None:
    found = run(measured, world, model, sizes, changes, seconds=200.0)
    stages = sizes.get("pipeline", 1)
    for rank in range(stages):
        (plan,) = run(planned, 1, model, sizes, changes, world, rank, seconds=200.0)
        real = found[rank * world // stages]
        assert plan.footprint.total == pytest.approx(real, rel=0.03), (plan, real)


def test_depth_follows_from_few_layers() -> None:
    deep = {"model": "dense", "sizes": {}, "changes": {"micro_batch_size": 1}}
    (few,) = run(planned_deep, 1, True)
    (all_of_them,) = run(planned_deep, 1, False)
    assert few.footprint.total == pytest.approx(all_of_them.footprint.total, rel=1e-6), deep
    assert few.flops == pytest.approx(all_of_them.flops)


def planned_deep(extrapolate: bool) -> Any:
    warnings.filterwarnings("ignore")
    config = config_of("dense", {}, {"micro_batch_size": 1})
    deep = spec([layer(ATTENTION, {"kind": "gated", "dim": 384}, repeat=12)], dim=128, vocab_size=1024, max_length=256)
    return plan_rank(config.model_copy(update={"model": deep}), 2, device="cpu", extrapolate=extrapolate)


def test_ranks_between_two_alike_follow_from_them() -> None:
    sizes = {"pipeline": 6, "stage_layers": [2] * 6}
    config = config_of("dense", sizes, {"micro_batch_size": 1})
    deep = spec([layer(ATTENTION, {"kind": "gated", "dim": 384}, repeat=12)], dim=128, vocab_size=1024, max_length=256)
    config = config.model_copy(update={"model": deep})
    plans = dry_run(config, 6, device="cpu")
    (real,) = run(plan_rank_of, 1, config, 6, 2)
    assert [plan.pipeline_rank for plan in plans] == list(range(6))
    assert plans[2].footprint.total == pytest.approx(real.footprint.total, rel=1e-6)
    assert plans[2].flops == pytest.approx(real.flops)
    assert dict(plans[2].modules) == pytest.approx(dict(real.modules))


def plan_rank_of(config: DryRunConfig, world: int, rank: int) -> Any:
    return plan_rank(config, world, rank, device="cpu", extrapolate=False)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"activation_checkpointing": {"kind": "offload"}}, "training.activation_checkpointing"),
        ({"batch_size": 3}, "training.batch_size"),
    ],
)
def test_what_cannot_be_planned_is_said(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        dry_run(config_of("dense", {}, changes), 2)


def test_a_model_without_vocabulary_is_refused() -> None:
    config = config_of("dense", {}, {})
    open_ended = config.model.model_copy(update={"vocab_size": None})
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        dry_run(config.model_copy(update={"model": open_ended}), 2)
