"""What PyTorch does quietly and a change of version may change: each of these once gave wrong numbers, or a hang."""

import math

import pytest
import torch
from distributed_zoo import MODELS, loader, training, whole
from harness import RankFailed, meshed, run
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from treadle.parallel import compile as module
from treadle.parallel.config import ParallelConfig
from treadle.parallel.data import release
from treadle.parallel.mesh import PATIENCE, Mesh, open_mesh
from treadle.parallel.shards import copy_whole, cut_like, gather, local, pieces
from treadle.train.forward_backward import forward_backward
from treadle.train.loop import Callback, Loop
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, MuonConfig
from treadle.train.schedules import ConstantConfig
from treadle.train.setup import build_model, build_state


def test_private_names_are_still_there():
    assert callable(DeviceMesh._flatten)
    assert callable(DeviceMesh._unflatten)
    assert callable(DeviceMesh._concatenate)
    assert callable(torch.distributed.distributed_c10d._set_pg_timeout)


def sums_of_groups_of_one():
    """Gradients of a weight whose shard group has one process, with both lines of the sum convention."""
    with meshed(replicate=2) as mesh:
        layer = torch.nn.Linear(4, 4, bias=False)
        fully_shard(layer, mesh=mesh.fsdp)
        assert isinstance(layer, FSDPModule)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)
        layer(torch.full((1, 4), float(mesh.rank + 1))).sum().backward()
        return whole(layer.weight.grad)


def test_gradients_are_summed_also_over_groups_of_one():
    for grad in run(sums_of_groups_of_one, 2):
        assert torch.equal(grad, torch.full((4, 4), 3.0))


def where_pieces_lie():
    with meshed(replicate=2) as mesh:
        assert mesh.fsdp is not None
        root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        values = torch.arange(35.0).view(7, 5)
        found = []
        for placements in ([Shard(0), Shard(1)], [Shard(0), Shard(0)], [Shard(1), Shard(1)]):
            spread = distribute_tensor(values, root, placements)
            (part,) = pieces(spread)
            rows, columns = (slice(o, o + n) for o, n in zip(part.offsets, part.values.shape, strict=True))
            found.append(torch.equal(part.values, values[rows, columns]))
            found.append(torch.equal(part.values, cut_like(values, spread)))
            copy_whole(spread, values + 1)
            found.append(torch.equal(gather(spread), values + 1))
        return found


def test_pieces_are_where_they_say():
    for found in run(where_pieces_lie, 4):
        assert found == [True] * 9


def narrow(model, changes):
    """The dtypes in which a bf16 model's weights reach its blocks, and the loss."""
    with meshed() as mesh:
        config = training(precision="bf16")
        built = build_model(MODELS[model], config, seed=0, mesh=mesh)
        seen = {}
        for name, module in built.named_modules():
            module.register_forward_pre_hook(lambda m, args, name=name: seen.update(here(name, m)))
        loss = forward_backward(built, loader(mesh).micro_batches(0, 2), cross_entropy, mesh=mesh).loss
        grads = {p.grad.dtype for p in built.parameters() if p.grad is not None}
        return loss.item(), seen, grads


def here(name, module):
    return {f"{name}.{leaf}": p.dtype for leaf, p in module.named_parameters(recurse=False)}


def test_weights_that_compute_in_float32_are_never_rounded():
    for model in ("moe", "delta"):
        config = training(precision="bf16")
        alone = build_model(MODELS[model], config, seed=0)
        expected = forward_backward(alone, loader(Mesh()).micro_batches(0, 2), cross_entropy).loss.item()
        for loss, dtypes, grads in run(narrow, 2, model, {}):
            assert abs(loss - expected) < 1e-6, "the casts are those of one process"
            assert grads == {torch.float32}
            wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
            assert any(".router." in name or "A_log" in name for name in wide)
            assert any(name.endswith("feedforward.gate_up.weight") for name in dtypes.keys() - wide)


def evaluated():
    with meshed() as mesh:
        built = build_model(MODELS["tied"], training(), seed=0, mesh=mesh)
        with torch.no_grad():
            built.hidden(loader(mesh).batch(0).tokens_BS)
        gathered = isinstance(built.embedding.weight, torch.distributed.tensor.DTensor)
        release(built)
        return gathered, isinstance(built.embedding.weight, torch.distributed.tensor.DTensor)


def test_a_forward_alone_leaves_weights_gathered_until_released():
    assert run(evaluated, 2) == [(False, True)] * 2


def compiled(model, precision):
    with meshed() as mesh:
        return compiled_on(mesh, model, precision, compile=True)


def compiled_on(mesh, model, precision, **changes):
    module.compile_layers.__kwdefaults__["backend"] = "aot_eager"
    config = training(precision=precision, activation_checkpointing="selective", **changes)
    built = build_model(MODELS[model], config, seed=0, mesh=mesh)
    result = forward_backward(built, loader(mesh).micro_batches(0, 2), cross_entropy, mesh=mesh)
    return result.loss.item(), {n: whole(p.grad) for n, p in built.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("model", "precision"), [("plain", "fp32"), ("moe", "bf16")])
def test_compiled_layers(model, precision):
    """In bf16 a mixture's router is gathered apart, inside what is compiled."""
    expected, right = compiled_on(Mesh(), model, precision)
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    for loss, grads in run(compiled, 2, model, precision):
        assert abs(loss - expected) < tolerance
        for name, grad in right.items():
            assert (grads[name] - grad).abs().max() < tolerance, name


def one_dies():
    with meshed() as mesh:
        if mesh.rank == 1:
            raise ValueError("the reason")
        mesh.wait()


def test_the_harness_ends_all_when_one_fails():
    with pytest.raises(RankFailed, match=r"rank 1 failed[\s\S]*the reason"):
        run(one_dies, 2)


def agreed():
    with meshed() as mesh:
        with mesh.in_turn():
            pass
        picked = mesh.leaders(lambda: f"from {mesh.rank}")
        raised = ""
        try:
            mesh.leaders(lambda: 1 / 0)
        except ZeroDivisionError as error:
            raised = str(error)
        counts = mesh.sum_counts(mesh.rank + 1, 10)
        return picked, raised, mesh.any(mesh.rank == 1), mesh.all(mesh.rank == 1), counts


def test_what_processes_agree_on():
    assert run(agreed, 2) == [("from 0", "division by zero", True, False, [3, 20])] * 2


def test_one_process_has_a_mesh_too():
    mesh = Mesh()
    assert mesh.leads
    assert mesh.sum_counts(3) == [3]
    assert mesh.any(True)
    assert not mesh.all(False)
    assert ParallelConfig().layout(1) == mesh.layout


def timeouts():
    with open_mesh(ParallelConfig(tensor=2).layout(4), torch.device("cpu"), timeout=7200.0) as mesh:
        groups = [mesh.fsdp.get_group(), mesh.tensor.get_group(), mesh.batch.get_group(), mesh.background, mesh.patient]
        found = [group._get_backend(torch.device("cpu")).options._timeout for group in (None, *groups) if group]
        return [time.total_seconds() for time in found]


def test_every_group_waits_as_long_as_it_is_told():
    """But for that of waits."""
    assert run(timeouts, 4) == [[7500.0] * 4 + [PATIENCE.total_seconds()]] * 4


def half(model, sizes):
    """Three steps in fp16 with a loss scaler that begins too high."""
    with meshed(**sizes) as mesh:
        return half_steps(mesh, model)


def half_steps(mesh, model):
    config = training(precision="fp16", steps=6)
    state = build_state(build_model(MODELS[model], config, seed=0, mesh=mesh), AdamWConfig(lr=1e-3), config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    losses = Losses()
    loop = Loop(state, config, ConstantConfig(), cross_entropy, [losses], mesh=mesh)
    loop.run(loader(mesh).iterate_micro(2, 0, 6))
    return losses.losses, losses.norms, state.scaler.get_scale()


def test_a_gradient_that_overflows_is_skipped_by_all():
    """Which step overflows hangs on the last bit of a gradient; that all processes skip the same must not."""
    expected, norms, scale = half_steps(Mesh(), "plain")
    first, second = run(half, 2, "plain", {})
    assert str(first) == str(second)
    assert first[0][:3] == pytest.approx(expected[:3], rel=1e-3)
    for found, found_scale in ((norms, scale), (first[1], first[2])):
        assert found_scale < 2.0**24
        assert not all(math.isfinite(norm) for norm in found)
        assert math.isfinite(found[-1])


def half_apart(sizes, optimizer, poisoned):
    """Scale and step after four steps in fp16, of which the second overflows on the last rank, in one parameter."""
    with meshed(**sizes) as mesh:
        config = training(precision="fp16")
        state = build_state(build_model(MODELS["plain"], config, seed=0, mesh=mesh), optimizer, config)

        def poison(name, grad):
            if poisoned in name and state.step == 1 and mesh.rank == mesh.world.size - 1:
                local(grad).view(-1)[:1] = math.inf

        for name, parameter in state.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: poison(name, p.grad))
        losses = Losses()
        Loop(state, config, ConstantConfig(), cross_entropy, [losses], mesh=mesh).run(
            loader(mesh).iterate_micro(8, 0, 4)
        )
        return state.scaler.get_scale(), [math.isfinite(norm) for norm in losses.norms]


@pytest.mark.parametrize(
    ("sizes", "optimizer", "poisoned"),
    [
        ({"tensor": 2}, AdamWConfig(), "layers.0"),
        ({"tensor": 2}, MuonConfig(), "layers.0"),
        ({}, MuonConfig(), "embed"),
    ],
)
def test_a_step_that_overflows_on_one_is_skipped_in_any_layout(sizes, optimizer, poisoned):
    assert run(half_apart, 2, sizes, optimizer, poisoned) == [(2.0**15, [True, False, True, True])] * 2


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, loop, record):
        self.losses.append(record.loss)
        self.norms.append(record.grad_norm)
