"""Matrices that are cut between processes: loss and every gradient against one process, in fp32."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from distributed_zoo import MODELS, assert_same_step, step_of, step_on_ranks, training
from harness import meshed, run

from treadle.errors import ConfigError
from treadle.parallel import compile as compilation
from treadle.parallel.config import ParallelConfig
from treadle.parallel.mesh import Mesh
from treadle.train import setup
from treadle.train.setup import build_model

# model, ranks, sizes, rows at a time, changes to the training section
CASES = {
    "plain": ("plain", 2, {"tensor": 2}, 4, {}),
    "tied": ("tied", 2, {"tensor": 2}, 8, {}),
    "heads": ("heads", 2, {"tensor": 2}, 8, {}),
    "wide": ("wide", 2, {"tensor": 2}, 8, {}),
    "latent": ("latent", 2, {"tensor": 2}, 8, {}),
    "delta": ("delta", 2, {"tensor": 2}, 8, {}),
    "experts": ("experts", 2, {"tensor": 2}, 4, {}),
    "further": ("further", 2, {"tensor": 2}, 8, {}),
    "shared-heads": ("heads", 4, {"tensor": 4}, 8, {}),
    "shared-wide": ("wide", 4, {"tensor": 4}, 8, {}),
    "shared-delta": ("grouped_delta", 4, {"tensor": 4}, 8, {}),
    "sharded": ("experts", 4, {"shard": 2, "tensor": 2}, 2, {}),
    "copied": ("heads", 4, {"replicate": 2, "tensor": 2}, 2, {}),
    "recomputed": ("experts", 2, {"tensor": 2}, 8, {"activation_checkpointing": "full"}),
    "selective": ("heads", 2, {"tensor": 2}, 8, {"activation_checkpointing": "selective"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_that_of_one_process(case):
    model, ranks, sizes, rows, changes = CASES[case]
    expected = step_of(model, Mesh(), rows, **changes)
    for step in run(step_on_ranks, ranks, model, rows, {}, sizes):
        assert_same_step(step, expected)


def compiled_step(model: str, sizes: dict[str, int]) -> Any:
    setup.compile_layers = partial(compilation.compile_layers, backend="aot_eager")
    with meshed(**sizes) as mesh:
        step = step_of(model, mesh, 8, compile=True)
    counters = torch._dynamo.utils.counters
    return step, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


def test_compiled_layers_are_whole_graphs():
    expected = step_of("wide", Mesh(), 8)
    for step, breaks, graphs in run(compiled_step, 2, "wide", {"tensor": 2}):
        assert_same_step(step, expected)
        assert not breaks
        assert graphs == 2


def fused_step(model: str, sizes: dict[str, int], changes: dict[str, Any]) -> Any:
    """With PyTorch's own fallbacks in the place of the kernels that CPUs lack, and how often each was called."""
    import torch.distributed._symmetric_memory as memory

    calls: Counter[str] = Counter()

    def counted(name: str, fallback: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return fallback(*arguments)

        return call

    library = torch.library.Library("symm_mem", "IMPL")
    for name, fallback in (
        ("fused_all_gather_matmul", memory._fused_all_gather_matmul_fallback),
        ("fused_matmul_reduce_scatter", memory._fused_matmul_reduce_scatter_fallback),
    ):
        library.impl(name, counted(name, fallback), "CPU")
    setup.compile_layers = partial(compilation.compile_layers, backend="aot_eager")
    with meshed(**sizes) as mesh:
        step = step_of(model, mesh, 8, ParallelConfig(async_tensor=True), **changes)
    return step, dict(calls)


@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"activation_checkpointing": "selective"}], ids=str)
def test_asynchronous_is_fused(changes):
    """Each of two layers has two entries and two exits, and the backward of the one is the other."""
    expected = step_of("plain", Mesh(), 8)
    for step, calls in run(fused_step, 2, "plain", {"tensor": 2}, changes):
        assert_same_step(step, expected)
        if not changes:
            assert calls == {"fused_all_gather_matmul": 8, "fused_matmul_reduce_scatter": 8}
        assert min(calls["fused_all_gather_matmul"], calls["fused_matmul_reduce_scatter"]) >= 8


def refused(model: str) -> str:
    with meshed(tensor=2) as mesh, pytest.raises(ConfigError) as error:
        build_model(MODELS[model], training(), seed=0, mesh=mesh, parallel=ParallelConfig(async_tensor=True))
    return str(error.value)


def test_asynchronous_is_refused_where_it_cannot_be():
    for message in run(refused, 2, "plain"):
        assert "parallel.async_tensor" in message and "cpu" in message
