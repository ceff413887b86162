"""Mixtures in training: what their losses add to the gradient, what is recorded, and that the load gets even."""

from typing import Any

import pytest
import torch
from train_zoo import gradients, make_loader, make_model, make_state, training_config

from treadle.nn.transformer import Transformer
from treadle.parallel.compile import compile_layers
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig, TrainingConfig
from treadle.train.forward_backward import StepResult, forward_backward
from treadle.train.loop import Callback, Loop
from treadle.train.losses import Loss, cross_entropy
from treadle.train.muon import Muon, orthogonalise
from treadle.train.optimizers import AdamWConfig, MuonConfig, SGDConfig
from treadle.train.routing import balance, mixtures
from treadle.train.schedules import ConstantConfig


def layers(repeat: int = 2, **options: Any) -> list[dict[str, Any]]:
    moe = {"kind": "moe", "experts": 8, "top_k": 2, "dim": 16, **options}
    mixer = {"kind": "attention", "heads": 2, "kv_heads": 1}
    return [{"kind": "pre_norm", "repeat": repeat, "mixer": mixer, "feedforward": moe}]


def run(model: Transformer, rows: int = 4, **options: Any) -> tuple[StepResult, dict[str, torch.Tensor]]:
    result = forward_backward(model, make_loader().micro_batches(0, rows), cross_entropy, **options)
    return result, gradients(model)


def plain_objective(model: Transformer, batch: Any) -> Loss:
    """The losses of the mixtures in the open: taken from their inputs by hooks, added to the total."""
    seen = []
    hooks = [m.register_forward_hook(lambda m, args, _: seen.append((m, args[0]))) for m in mixtures(model).values()]
    loss = cross_entropy(model, batch).total
    for hook in hooks:
        hook.remove()
    positions = batch.tokens_BS.numel()
    for module, x in seen:
        routing = module.router(x.flatten(0, 1))
        probabilities = routing.logits_TE.softmax(-1)
        counts = torch.nn.functional.one_hot(routing.experts_TK, 8).sum((0, 1))
        balance = 8 * (counts / positions * probabilities.mean(0)).sum()
        z = routing.logits_TE.logsumexp(-1).square().mean()
        loss = loss + batch.valid_tokens * (0.3 * balance + 0.2 * z)
    return Loss(loss)


@pytest.mark.parametrize("scale", [1.0, torch.tensor(8.0)])
def test_gradient_is_that_of_the_whole_objective(scale: float | torch.Tensor) -> None:
    model = make_model(layers=layers(balance_loss=0.3, z_loss=0.2), init={"kind": "normal", "std": 0.2})
    result, found = run(model, loss_scale=scale)
    model.zero_grad(set_to_none=True)
    silent = make_model(layers=layers(balance_loss=0.0), init={"kind": "normal", "std": 0.2})
    silent.load_state_dict(model.state_dict())
    forward_backward(silent, make_loader().micro_batches(0, 4), plain_objective, loss_scale=scale)
    torch.testing.assert_close(found, gradients(silent), rtol=1e-4, atol=1e-6)
    assert result.loss == forward_backward(silent, make_loader().micro_batches(0, 4), cross_entropy).loss


def test_loads_add_up_over_micro_batches_and_close() -> None:
    model = make_model(layers=layers(z_loss=0.1, capacity=0.5), init={"kind": "normal", "std": 0.2})
    whole, _ = run(model, 4)
    parts, _ = run(model, 1)
    positions = 4 * 16
    for name in ("layers.0.feedforward", "layers.1.feedforward"):
        assert whole.loads[name].counts_E.sum() == 2 * positions
        assert whole.loads[name].dropped > 0
    first = "layers.0.feedforward"  # later layers see what the capacity of a smaller micro-batch has dropped
    torch.testing.assert_close(parts.loads[first].counts_E, whole.loads[first].counts_E)
    torch.testing.assert_close(parts.loads[first].z_loss, whole.loads[first].z_loss)
    assert {"balance_loss", "router_z_loss", "expert_imbalance", "expert_imbalance_max", "dropped"} <= set(
        whole.metrics
    )
    assert all(module.observation is None for module in mixtures(model).values())
    assert run(make_model())[0].loads == {}


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_recomputation_and_compilation_count_once(mode: Any, backend: str | None, capacity: float | None) -> None:
    torch._dynamo.reset()
    options = layers(
        balance_loss=0.3, z_loss=0.1, capacity=capacity, compute="grouped", shared={"kind": "dense", "dim": 8}
    )
    expected, wanted = run(make_model(layers=options), 2)
    model = make_model(training_config(activation_checkpointing=mode), layers=options)
    if backend:
        compile_layers(model.layers, backend=backend)
    result, found = run(model, 2)
    torch.testing.assert_close(result.loss, expected.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    for name, load in expected.loads.items():
        torch.testing.assert_close(result.loads[name].counts_E, load.counts_E, rtol=0, atol=0)
        torch.testing.assert_close(result.loads[name].balance_loss, load.balance_loss)
    torch._dynamo.reset()


def test_a_mixture_that_is_compiled_in_pieces_loses_nothing() -> None:
    """Where experts are computed one by one the graph breaks, and what attaches the losses begins a graph."""
    torch._dynamo.reset()
    options = layers(repeat=1, balance_loss=0.3, z_loss=0.1, compute="loop")
    expected, wanted = run(make_model(layers=options), 2)
    model = make_model(layers=options)
    compile_layers(model.layers, backend="aot_eager")
    result, found = run(model, 2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.metrics, expected.metrics)
    torch._dynamo.reset()


def test_compiled_mixtures_have_no_break_and_share_a_graph() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = make_model(layers=layers(repeat=4, compute="grouped", balance_bias=0.001))
    compile_layers(model.layers, backend=count)  # type: ignore[arg-type]
    for _ in range(3):
        forward_backward(model, make_loader().micro_batches(0, 2), cross_entropy)
    assert len(graphs) == 1
    torch._dynamo.reset()


def train(steps: int = 120, **options: Any) -> tuple[list[float], Transformer]:
    """Imbalance at each step of a run whose router starts lopsided."""
    config: TrainingConfig = training_config(steps=steps, batch_size=8)
    state = make_state(config, AdamWConfig(lr=3e-3), layers=layers(repeat=1, **options))
    with torch.no_grad():
        for module in mixtures(state.model).values():
            module.router.gate.weight[:2] += 0.5 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).abs()
            module.router.gate.weight.mul_(4)
    found: list[float] = []

    class Watch(Callback):
        def step(self, loop: Loop, record: Any) -> None:
            found.append(record.metrics["expert_imbalance_max"])

    loop = Loop(state, config, ConstantConfig(), cross_entropy, [Watch()])
    loop.run(make_loader(8).iterate_micro(4, 0, steps))
    return found, state.model


@pytest.mark.parametrize(
    "options",
    [
        {"balance_loss": 0.1},
        {"balance_loss": 0.0, "balance_bias": 0.02, "router": "sigmoid"},
    ],
    ids=["loss", "bias"],
)
def test_load_gets_even(options: dict[str, Any]) -> None:
    without, _ = train(balance_loss=0.0, router=options.get("router", "softmax"))
    balanced, model = train(**options)
    assert balanced[0] == without[0]
    last, last_without = (sum(found[-8:]) / 8 for found in (balanced, without))
    assert last < 1.6
    assert last - 1 < 0.5 * (last_without - 1)
    if "balance_bias" in options:
        (module,) = mixtures(model).values()
        assert module.router.balance_bias.abs().max() > 0.02


def test_bias_moves_by_its_rate_against_the_load() -> None:
    model = make_model(layers=layers(balance_bias=0.25, router="sigmoid"))
    result = forward_backward(model, make_loader().micro_batches(0, 2), cross_entropy)
    balance(model, result.loads)
    for name, module in mixtures(model).items():
        counts = result.loads[name].counts_E
        expected = torch.where(counts > 16, -0.25, torch.where(counts < 16, 0.25, 0.0))
        torch.testing.assert_close(module.router.balance_bias.detach(), expected)


@pytest.mark.parametrize("optimizer", [MuonConfig(), AdamWConfig(), SGDConfig()], ids=lambda o: o.kind)
def test_optimizers_leave_the_bias_alone_and_hold_the_rest_once(optimizer: Any) -> None:
    model = make_model(layers=layers(balance_bias=0.01))
    held = [p for o in optimizer.build(model).optimizers for group in o.param_groups for p in group["params"]]
    wanted = [p for name, p in model.named_parameters() if not name.endswith("balance_bias")]
    assert sorted(map(id, held)) == sorted(map(id, wanted))


def test_muon_steps_each_expert_and_part_by_itself() -> None:
    model = make_model(layers=layers())
    muon = MuonConfig().build(model).optimizers[0]
    parts = {id(group["params"][0]): group["parts"] for group in muon.param_groups}
    block = model.layers["0"].feedforward
    assert parts[id(block.gate_up.weight)] == (16, 16)
    stack = torch.nn.Parameter(torch.randn(3, 24, 8))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach().unbind()]
    stack.grad = torch.randn(3, 24, 8)
    for matrix, grad in zip(alone, stack.grad.unbind(), strict=True):
        matrix.grad = grad.clone()
    Muon([{"params": [stack], "parts": (16, 8)}], lr=0.1, weight_decay=0.1).step()
    Muon([{"params": alone, "parts": (16, 8)}], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(stack, torch.stack(alone), rtol=0, atol=2e-3)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(5, 8, 30)).float())
    assert values.shape == (5, 8)
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("optimizer", [MuonConfig(lr=0.01), AdamWConfig(lr=0.01)], ids=lambda o: o.kind)
def test_going_on_from_a_checkpoint_is_exact(tmp_path: Any, optimizer: Any) -> None:
    options = layers(balance_bias=0.1, router="sigmoid")
    losses: list[float] = []

    class Record(Callback):
        def step(self, loop: Loop, record: Any) -> None:
            losses.append(record.loss)

    def go(state: Any, steps: int) -> None:
        loop = Loop(state, training_config(steps=steps), ConstantConfig(), cross_entropy, [Record()])
        loop.run(make_loader().micro_batches(step, 2) for step in range(state.step, steps))

    go(make_state(training_config(), optimizer, layers=options), 6)
    expected = losses.copy()
    losses.clear()
    state = make_state(training_config(), optimizer, layers=options)
    go(state, 3)
    Checkpointer(tmp_path, CheckpointConfig()).save(state, {}, wait=True)
    fresh = make_state(training_config(), optimizer, layers=options)
    for parameter in fresh.model.parameters():
        parameter.data.fill_(7.0)
    Checkpointer(tmp_path, CheckpointConfig()).load(fresh, 3)
    assert fresh.model.layers["0"].feedforward.router.balance_bias.any()
    go(fresh, 6)
    assert losses == expected
