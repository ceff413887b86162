"""Muon against PyTorch's own; which optimizer holds which parameter, and what decays."""

import pytest
import torch
from train_zoo import make_model

from treadle.train import adamw
from treadle.train.muon import Muon, orthogonalise
from treadle.train.optimizers import AdamWConfig, MuonConfig, Optimizers, SGDConfig

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 16), (64, 8)]


def random_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def random_parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("iterations", [5, 3])
def test_muon_is_pytorchs(nesterov, iterations):
    ours, theirs = random_parameters(), random_parameters()
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    mine = Muon([{"params": ours}], iterations=iterations, **settings)
    reference = torch.optim.Muon(theirs, ns_steps=iterations, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(6):
        random_gradients(ours, step)
        random_gradients(theirs, step)
        mine.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_muon_orthogonalises_where_it_is_told(monkeypatch):
    """Weights that are offloaded lie in host memory, and their momentum: neither has to move."""
    (weight,), seen = random_parameters([(8, 6)]), []

    def there(x, iterations):
        seen.append(x.device.type)
        return torch.ones(x.shape, dtype=torch.bfloat16)

    monkeypatch.setattr("treadle.train.muon.orthogonalise", there)
    random_gradients([weight], 0)
    before = weight.detach().clone()
    Muon([{"params": [weight]}], lr=0.1, weight_decay=0.0, device=torch.device("meta")).step()
    assert seen == ["meta"]
    torch.testing.assert_close(weight.detach(), before - 0.1 * 0.2 * 8**0.5)


def test_muon_steps_each_part_as_a_parameter_of_its_own():
    shapes = [(32, 24), (8, 24), (16, 24)]
    apart = random_parameters(shapes)
    stacked = torch.nn.Parameter(torch.cat([p.detach() for p in apart]))
    one = Muon([{"params": [stacked], "parts": (32, 8, 16)}], lr=0.02, weight_decay=0.1)
    three = Muon([{"params": apart}], lr=0.02, weight_decay=0.1)
    for step in range(4):
        random_gradients(apart, step)
        stacked.grad = torch.cat([p.grad for p in apart if p.grad is not None])
        one.step()
        three.step()
    torch.testing.assert_close(stacked, torch.cat(apart), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (8, 100), (100, 8), (32, 128)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_orthogonalise_brings_singular_values_near_one(shape, scale):
    for seed in range(5):
        x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        values = torch.linalg.svdvals(orthogonalise(x).float())
        assert values.min() > 0.5
        assert values.max() < 1.3
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        aligned = torch.linalg.svdvals(orthogonalise(x).float() - u @ vh)
        assert aligned.max() < 0.5, "the singular vectors are those of x"


def test_orthogonalise_of_zero_is_zero():
    assert not orthogonalise(torch.zeros(4, 8)).any()


VARIANTS = [
    {},
    {"tied": True},
    {"norm": "layer"},
    {
        "layers": [
            {
                "kind": "pre_norm",
                "norm": "layer",
                "mixer": {"kind": "attention", "heads": 2, "qk_norm": "rms", "bias": True, "output_bias": True},
                "feedforward": {"kind": "dense", "dim": 48, "bias": True},
            }
        ]
    },
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", [MuonConfig(), AdamWConfig(), SGDConfig()], ids=lambda o: o.kind)
def test_every_parameter_is_held_exactly_once(variant, optimizer):
    model = make_model(**variant)
    built = optimizer.build(model)
    held = [p for o in built.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_muon_holds_the_matrices_inside_the_layers_by_their_parts(tied):
    model = make_model(tied=tied)
    muon, adamw = MuonConfig().build(model).optimizers
    assert isinstance(muon, Muon)
    names = {id(p): name for name, p in model.named_parameters()}
    parts = {names[id(p)]: group["parts"] for group in muon.param_groups for p in group["params"]}
    expected = {}
    for layer in ("layers.0", "layers.1"):
        expected[f"{layer}.mixer.qkv.weight"] = (32, 16, 16)
        expected[f"{layer}.mixer.out.weight"] = ()
        expected[f"{layer}.feedforward.gate_up.weight"] = (64, 64)
        expected[f"{layer}.feedforward.down.weight"] = ()
    assert parts == expected
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert rest == set(names.values()) - set(expected)


LATENT = {"kind": "latent_attention", "heads": 2, "q_rank": 12, "kv_rank": 16, "nope_dim": 8, "rope_dim": 8}
MOE = {"kind": "moe", "experts": 4, "top_k": 2, "dim": 16, "shared": {"kind": "gated", "dim": 16}, "shared_gate": True}


def test_muon_holds_replicated_matrices_but_no_router() -> None:
    """By name, and the compressing projection of latent attention by its three parts."""
    layer = {"kind": "pre_norm", "mixer": {**LATENT, "value_dim": 8}, "feedforward": MOE}
    model = make_model(layers=[layer], position="learned")
    muon, _ = MuonConfig().build(model).optimizers
    names = {id(p): name for name, p in model.named_parameters()}
    parts = {names[id(p)].removeprefix("layers.0."): g["parts"] for g in muon.param_groups for p in g["params"]}
    assert parts == {
        "mixer.down.weight": (12, 16, 8),
        "mixer.q_up.weight": (),
        "mixer.kv_up.weight": (16, 16),
        "mixer.out.weight": (),
        "feedforward.gate_up.weight": (16, 16),
        "feedforward.down.weight": (),
        "feedforward.shared.gate_up.weight": (16, 16),
        "feedforward.shared.down.weight": (),
    }


@pytest.mark.parametrize("optimizer", [MuonConfig, AdamWConfig, SGDConfig], ids=lambda o: o.__name__)
def test_only_matrices_decay(optimizer):
    model = make_model(layers=VARIANTS[3]["layers"])
    for built in optimizer(weight_decay=0.3).build(model).optimizers:
        for group in built.param_groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.3 if parameter.ndim == 2 else 0.0)


def test_decay_by_its_effect():
    """With a gradient of zero a step leaves vectors alone, and scales matrices by 1 - lr * decay."""
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for config in (AdamWConfig(lr=0.01, weight_decay=0.5), MuonConfig(lr=0.01, weight_decay=0.5)):
        config.build(model).step()
    for name, parameter in model.named_parameters():
        factor = (1 - 0.005) ** 2 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    """v = m v + (g + decay w); w -= lr (g + decay w + m v) with Nesterov, lr v without."""
    model = make_model()
    optimizers = SGDConfig(lr=0.1, weight_decay=0.01, momentum=0.8, nesterov=nesterov).build(model)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(4):
        random_gradients(list(model.parameters()), step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            grad = parameter.grad.double() + (0.01 if parameter.ndim == 2 else 0) * expected[name]
            velocity[name] = 0.8 * velocity[name] + grad
            expected[name] = expected[name] - 0.1 * (grad + 0.8 * velocity[name] if nesterov else velocity[name])
        optimizers.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_rates_follow_the_factor_from_their_peak():
    optimizers = MuonConfig(lr=0.2).build(make_model())
    assert optimizers.set_lr(0.5) == pytest.approx(0.1)
    assert optimizers.set_lr(0.25) == pytest.approx(0.05)
    assert {group["lr"] for o in optimizers.optimizers for group in o.param_groups} == {0.05}


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_adamw_clips_as_pytorch_does_before_it(limit, kernel, monkeypatch):
    """Also where tensors are stepped one by one, as on a GPU: which of them are, PyTorch's own lists decide."""
    if kernel:
        monkeypatch.setattr(adamw, "_suits_kernel", lambda parameter, *others: parameter.ndim == 2)
    ours, theirs = random_parameters(), random_parameters()
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2, "fused": True}
    optimizers = Optimizers([adamw.AdamW(ours, **options)])
    peer = torch.optim.AdamW(theirs, **options)
    for step in range(3):
        for parameters in (ours, theirs):
            random_gradients(parameters, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
        optimizers.clip(limit, norm)
        optimizers.step()
        peer.step()
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(optimizers.optimizers[0].state[mine], peer.state[other])
    assert optimizers.optimizers[0].factor is None
