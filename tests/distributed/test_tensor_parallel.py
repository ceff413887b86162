"""Matrices that are cut between processes: loss and every gradient against one process, in fp32."""

import os
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from distributed_zoo import MODELS, Case, alone, assert_same_step, step_of, steps, together, training, vary, whole
from harness import meshed, run

from treadle.attention import AttentionContext
from treadle.errors import ConfigError
from treadle.parallel import compile as compilation
from treadle.parallel.collectives import Peers, gather, sum_scatter, total
from treadle.parallel.config import ParallelConfig
from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import parts_of
from treadle.parallel.vocabulary import vocabulary_cross_entropy
from treadle.train import setup
from treadle.train.setup import build_model

CASES = {
    "plain": Case("plain", 2, {"tensor": 2}, 4),
    "tied": Case("tied", 2, {"tensor": 2}, 8),
    "heads": Case("heads", 2, {"tensor": 2}, 8),
    "wide": Case("wide", 2, {"tensor": 2}, 8),
    "latent": Case("latent", 2, {"tensor": 2}, 8),
    "delta": Case("delta", 2, {"tensor": 2}, 8),
    "experts": Case("experts", 2, {"tensor": 2}, 4),
    "further": Case("further", 2, {"tensor": 2}, 8),
    "shared-heads": Case("heads", 4, {"tensor": 4}, 8),
    "shared-wide": Case("wide", 4, {"tensor": 4}, 8),
    "shared-delta": Case("grouped_delta", 4, {"tensor": 4}, 8),
    "sharded": Case("experts", 4, {"shard": 2, "tensor": 2}, 2),
    "copied": Case("heads", 4, {"replicate": 2, "tensor": 2}, 2),
    "recomputed": Case("experts", 2, {"tensor": 2}, 8, training={"activation_checkpointing": "full"}),
    "selective": Case("heads", 2, {"tensor": 2}, 8, training={"activation_checkpointing": "selective"}),
}
found_in = steps(CASES)


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_that_of_one_process(name):
    for step in found_in(name):
        assert_same_step(step, alone(CASES[name].model, CASES[name].rows))


def compiled_step(model: str, sizes: dict[str, int], mode: str) -> Any:
    setup.compile_layers = partial(compilation.compile_layers, backend="aot_eager")
    with meshed(**sizes) as mesh:
        step = step_of(model, mesh, 4, compile=True, activation_checkpointing=mode)
    counters = torch._dynamo.utils.counters
    return step, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("model", "ranks", "sizes", "mode"),
    [
        # torch 2.13 fails here where a compiled layer sees DTensors: it keeps their mesh for the backward.
        ("plain", 2, {"tensor": 2}, "full"),
        ("wide", 4, {"shard": 2, "tensor": 2}, "selective"),
    ],
)
def test_compiled_layers_are_whole_graphs(model, ranks, sizes, mode):
    expected = step_of(model, Mesh(), 4)
    for step, breaks, graphs in run(compiled_step, ranks, model, sizes, mode):
        assert_same_step(step, expected)
        assert not breaks
        assert graphs == (1 if model == "plain" else 2)


def fused_step(model: str, sizes: dict[str, int], rows: int, schedule: str, changes: dict[str, Any]) -> Any:
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
        step = step_of(model, mesh, rows, ParallelConfig(async_tensor=True, schedule=schedule, **sizes), **changes)
    return step, dict(calls)


@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"activation_checkpointing": "selective"}], ids=str)
def test_asynchronous_is_fused(changes):
    """Each of two layers has two entries and two exits, and the backward of the one is the other."""
    expected = step_of("plain", Mesh(), 8)
    for step, calls in run(fused_step, 2, "plain", {"tensor": 2}, 8, "1f1b", changes):
        assert_same_step(step, expected)
        if not changes:
            assert calls == {"fused_all_gather_matmul": 8, "fused_matmul_reduce_scatter": 8}
        assert min(calls["fused_all_gather_matmul"], calls["fused_matmul_reduce_scatter"]) >= 8


def test_asynchronous_is_fused_where_gradients_of_weights_wait():
    """Four micro-batches through five layers of two entries and two exits, on the two processes of each pipeline."""
    found = run(fused_step, 4, "deep", {"pipeline": 2, "tensor": 2}, 2, "zbv", {"activation_checkpointing": "none"})
    assert_same_step(together([step for step, _ in found]), alone("deep", 2))
    for rank in (0, 1):
        for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
            assert found[rank][1][name] + found[rank + 2][1][name] == 4 * 5 * 4


def refused(model: str) -> str:
    with meshed(tensor=2) as mesh, pytest.raises(ConfigError) as error:
        build_model(MODELS[model], training(), seed=0, mesh=mesh, parallel=ParallelConfig(async_tensor=True))
    return str(error.value)


def refused_over_machines() -> str:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    return refused("plain")


def test_asynchronous_is_refused_over_machines():
    for message in run(refused_over_machines, 2):
        assert "1 processes on a machine cannot be shared out to groups of parallel.tensor=2" in message


def loops(x, weights):
    """Gradients of what is gathered and scattered along any dimension, for weights that do not lie in order."""
    with meshed(tensor=2) as mesh:
        assert mesh.tensor is not None
        peers, found = Peers(mesh.tensor.get_group().group_name, 2, mesh.rank), []
        for dim in range(x.ndim):
            for function in (gather, sum_scatter):
                mine = (x + mesh.rank).requires_grad_()
                y = function(mine, dim, peers)
                weight = weights[mesh.rank][[slice(n) for n in y.shape]]
                y.backward(weight.transpose(0, -1).contiguous().transpose(0, -1))
                found.append((y.detach(), weight, mine.grad))
        return found


@pytest.mark.parametrize("rows", [1, 2])
def test_gathers_and_sums_along_any_dimension(rows):
    x, weights = torch.randn(rows * 2, 4, 6, dtype=torch.float64), torch.randn(2, rows * 4, 8, 12, dtype=torch.float64)
    for dim, (gathered, summed) in enumerate(
        zip(*[iter(zip(*run(loops, 2, x, weights), strict=True))] * 2, strict=True)
    ):
        for rank in (0, 1):
            y, _, grad = gathered[rank]
            assert torch.equal(y, torch.cat([x, x + 1], dim))
            assert torch.allclose(grad, (gathered[0][1] + gathered[1][1]).chunk(2, dim)[rank], rtol=0, atol=1e-12)
            y, _, grad = summed[rank]
            assert torch.allclose(y, (2 * x + 1).chunk(2, dim)[rank], rtol=0, atol=1e-12)
            assert torch.equal(grad, torch.cat([summed[0][1], summed[1][1]], dim))


def test_asynchronous_is_refused_where_it_cannot_be():
    for message in run(refused, 2, "plain"):
        assert "parallel.async_tensor" in message
        assert "cpu" in message


TOKENS = [[5, 9, 2, 31, 63, 0, 7], [1, 1, 62, 40, 3, 8, 4]]  # seven: no even number


def scores(model: str, mesh: Mesh) -> dict[str, torch.Tensor]:
    """What the model says of sequences that can be cut and that cannot, and of the same token by token from a cache."""
    built = build_model(MODELS[model], training(), seed=0, mesh=mesh)
    vary(built)
    tokens, found = torch.tensor(TOKENS), {}
    with torch.no_grad():
        found["even"], found["odd"] = built(tokens[:, :6]), built(tokens)
        cache = built.make_cache(2, 8)
        for piece in (slice(0, 4), slice(4, 5), slice(5, 7)):
            positions = torch.arange(7).expand(2, 7)[:, piece]
            found[str(piece)] = built(tokens[:, piece], AttentionContext(positions, cache=cache))
    built.zero_grad()
    logits = built(tokens[:, :4])  # a loss of one's own, on whole scores
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:5].flatten()).backward()
    parts = parts_of(built)
    return found | {n: whole(p.grad, parts.get(n, ())) for n, p in built.named_parameters() if p.grad is not None}


def scores_on_ranks(model: str, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    with meshed(**sizes) as mesh:
        return scores(model, mesh)


@pytest.mark.parametrize(("model", "size"), [("heads", 2), ("latent", 2), ("grouped_delta", 4)])
def test_scores_are_whole(model, size):
    expected = scores(model, Mesh())
    for found in run(scores_on_ranks, size, model, {"tensor": size}):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name].shape == values.shape
            assert (found[name] - values).abs().max() < 2e-6, name


def odd_with_gradient() -> str:
    with meshed(tensor=2) as mesh:
        built = build_model(MODELS["plain"], training(), seed=0, mesh=mesh)
        with pytest.raises(ValueError, match="2 processes cannot share sequences of 7 tokens") as error:
            built(torch.tensor(TOKENS))
        return str(error.value)


def test_a_gradient_needs_an_even_sequence():
    assert all("multiples of parallel.tensor=2" in message for message in run(odd_with_gradient, 2))


def plain_results() -> list[bool]:
    """Whether what is gathered and scattered is a tensor like others, before it gets to a compiled layer."""
    with meshed(tensor=2) as mesh:
        assert mesh.tensor is not None
        peers, x = Peers(mesh.tensor.get_group().group_name, 2, mesh.rank), torch.randn(1, 4, 2, requires_grad=True)
        return [type(y) is torch.Tensor for y in (gather(x, 1, peers), sum_scatter(x, 1, peers), total(x, peers))]


def test_no_unfinished_result_leaves_a_collective():
    """torch 2.13 gets the gradients wrong of one that enters a compiled region."""
    assert run(plain_results, 2) == [[True] * 3] * 2


def cut_cross_entropy(weight, x, targets, options) -> list[torch.Tensor]:
    with meshed(tensor=2) as mesh:
        assert mesh.tensor is not None
        peers = Peers(mesh.tensor.get_group().group_name, 2, mesh.rank)
        mine, x = weight.chunk(2)[mesh.rank].clone().requires_grad_(), x.requires_grad_()
        loss, penalty = vocabulary_cross_entropy(x, mine, targets, peers, **options)
        loss.backward()
        assert mine.grad is not None
        assert x.grad is not None
        return [loss.detach(), penalty, mine.grad, x.grad]


@pytest.mark.parametrize(("softcap", "z_loss", "smoothing"), [(None, 0.0, 0.0), (2.0, 0.1, 0.2)])
def test_cross_entropy_over_a_cut_vocabulary(softcap, z_loss, smoothing):
    """In float64 against PyTorch's own. With 400 entries each, a target of 300 is -100 to the second process: no
    ignored one."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((800, 6), (7, 6)))
    targets = torch.tensor([300, 0, 799, -100, 399, 400, -100])
    leaves = [weight.clone().requires_grad_(), x.clone().requires_grad_()]
    logits = leaves[1] @ leaves[0].t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    penalty = z_loss * logits.logsumexp(-1)[targets != -100].square().sum()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) + penalty
    loss.backward()
    options = {"softcap": softcap, "z_loss": z_loss, "smoothing": smoothing, "chunk": 3}
    found = run(cut_cross_entropy, 2, weight, x, targets, options)
    for rank, (its_loss, its_penalty, dweight, _) in enumerate(found):
        assert its_loss.item() == pytest.approx(loss.item(), rel=1e-12)
        assert its_penalty.item() == pytest.approx(penalty.item(), rel=1e-12)
        assert torch.allclose(dweight, leaves[0].grad.chunk(2)[rank], rtol=0, atol=1e-12)
    assert torch.allclose(found[0][3] + found[1][3], leaves[1].grad, rtol=0, atol=1e-12)


def sums(mode: str) -> int:
    """How often something is summed and scattered in a step of two layers."""
    with meshed(tensor=2) as mesh, torch.profiler.profile() as profile:
        step_of("plain", mesh, 8, activation_checkpointing=mode)
    return sum(event.count for event in profile.key_averages() if event.key == SUM)


SUM = "c10d::reduce_scatter_tensor_coalesced_"  # what is sent, not what is asked for


def test_sums_are_not_sent_again():
    """Two in the forward of each layer and one of the embedding, and two in the backward of each layer."""
    assert run(sums, 2, "none") == [9, 9]
    assert run(sums, 2, "selective") == [9, 9]
    assert run(sums, 2, "full") == [11, 11]  # but for the last of a layer, which nothing asks for
