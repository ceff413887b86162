"""Every method: starts as the model it began with, computes what its formula says, changes nothing that is frozen."""

import pytest
import torch
import torch.nn.functional as F
from finetune_zoo import ATTENTION, MOE, base, layer, tokens, tuned

from treadle.config import resolve
from treadle.errors import ConfigError
from treadle.finetune import FinetuneConfig, merge, unmerge, without_updates
from treadle.finetune.attach import prepare, saved_parameters
from treadle.train.optimizers import AdamWConfig

METHODS = {
    "lora": {"method": "lora", "rank": 4},
    "rslora": {"method": "lora", "rank": 4, "rs": True},
    "parts": {"targets": {"layers.*.mixer.qkv.v": 2, "layers.1.feedforward.gate_up.gate": 3, "layers.*.mixer.out": 5}},
    "pissa": {"method": "lora", "rank": 4, "init": "pissa"},
    "dora": {"method": "dora", "rank": 4},
    "mora": {"method": "mora", "rank": 4},
    "mora-1": {"method": "mora", "rank": 8, "mora_type": 1},
    "ia3": {"method": "ia3"},
    "houlsby": {"method": "adapter", "rank": 6},
    "pfeiffer": {"method": "adapter", "rank": 6, "placement": "pfeiffer"},
    "parallel": {"method": "adapter", "rank": 6, "placement": "parallel", "scale": 4.0},
}


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_the_model_that_it_began_with(name):
    model = tuned(METHODS[name], varied=False)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), base()(tokens()), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_trained_changes_and_has_state(name):
    model = tuned(METHODS[name]).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learned
    assert learned.isdisjoint(n for n, _ in base().named_parameters())
    optimizers = AdamWConfig(lr=0.1).build(model)
    for _ in range(2):
        model(tokens()).square().mean().backward()
        optimizers.step()
        optimizers.zero_grad()
    held = {id(p) for o in optimizers.optimizers for p in o.state}
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (n not in learned), n
        assert (id(p) in held) == (n in learned), n


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].get("method") != "adapter"])
def test_merging_gives_the_same_outputs_and_can_be_taken_back_to_the_bit(name):
    model = tuned(METHODS[name])
    with torch.no_grad():
        before, original = model(tokens()), {n: p.clone() for n, p in model.named_parameters()}
        merge(model)
        merge(model)
        torch.testing.assert_close(model(tokens()), before, atol=2e-5, rtol=1e-5)
        assert any(not torch.equal(p, original[n]) for n, p in model.named_parameters())
        unmerge(model)
        assert all(torch.equal(p, original[n]) for n, p in model.named_parameters())
        assert torch.equal(model(tokens()), before)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pissa"])
def test_without_its_updates_it_is_the_model_that_it_began_with(name):
    model = tuned(METHODS[name])
    with torch.no_grad():
        before = model(tokens())
        with without_updates(model):
            torch.testing.assert_close(model(tokens()), base()(tokens()), atol=1e-6, rtol=0)
        assert torch.equal(model(tokens()), before)
        assert (before - base()(tokens())).abs().max() > 1e-2


def weight_of(model, path):
    return model.get_submodule(path)._parameters["weight"].double()


def test_lora_is_its_formula():
    model = tuned({"targets": {"layers.0.mixer.qkv.k": 3}, "alpha": 5.0}).double()
    qkv = model.layers["0"].mixer.qkv
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    A, B = (getattr(qkv.updates["k"], name).weight for name in "AB")
    delta = torch.zeros(64, 32, dtype=torch.float64)
    delta[32:48] = 5 / 3 * B @ A
    torch.testing.assert_close(qkv(x), F.linear(x, qkv.weight + delta, qkv.bias), atol=1e-12, rtol=0)


def test_dora_is_its_formula_and_its_norms_have_no_gradient():
    model = tuned({"method": "dora", "targets": {"layers.0.feedforward.down": 3}, "alpha": 6.0}).double()
    down = model.layers["0"].feedforward.down
    update, x = down.updates["all"], torch.randn(7, 48, dtype=torch.float64)
    whole = down.weight + 2 * update.B.weight @ update.A.weight
    expected = F.linear(x, update.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True).detach())
    torch.testing.assert_close(down(x), expected, atol=1e-12, rtol=0)
    learned = list(update.parameters())
    upstream = torch.randn_like(expected)
    for found, wanted in zip(
        torch.autograd.grad(down(x), learned, upstream), torch.autograd.grad(expected, learned, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)


def test_pissa_begins_with_the_largest_singular_vectors():
    model, original = tuned({"rank": 4, "init": "pissa", "alpha": 8.0}, varied=False), base()
    path = "layers.1.mixer.out"
    layer, whole = model.get_submodule(path), weight_of(original, path)
    principal = 2 * (layer.updates["all"].B.weight @ layer.updates["all"].A.weight).double()
    U, S, V = torch.linalg.svd(whole)
    torch.testing.assert_close(principal, U[:, :4] * S[:4] @ V[:4], atol=1e-5, rtol=0)
    torch.testing.assert_close(weight_of(model, path), whole - principal, atol=1e-6, rtol=0)


def test_lora_plus_gives_b_a_rate_of_its_own():
    model = tuned({"rank": 4, "lr_ratio": 16.0})
    rates = {id(p): g["lr"] for g in AdamWConfig(lr=0.01).build(model).optimizers[0].param_groups for p in g["params"]}
    for name, parameter in saved_parameters(model):
        assert rates[id(parameter)] == pytest.approx(0.16 if ".B." in name else 0.01), name


def test_experts_have_their_own_updates():
    model = tuned({"targets": {"layers.0.feedforward.*": 2}}, layer(MOE, 1))
    moe = model.layers["0"].feedforward
    update = moe.gate_up.updates["up"]
    assert update.A.weight.shape == (4, 2, 32)
    assert update.B.weight.shape == (4, 16, 2)
    x, ends = torch.randn(10, 32), torch.tensor([3, 3, 7, 10], dtype=torch.int32)
    found = moe.gate_up(x, ends)
    for expert, (a, b) in enumerate(zip([0, 3, 3, 7], [3, 3, 7, 10], strict=True)):
        whole = moe.gate_up.weight[expert].clone()
        for rows, part in ((slice(16), "gate"), (slice(16, 32), "up")):
            pair = moe.gate_up.updates[part]
            whole[rows] += 8 * pair.B.weight[expert] @ pair.A.weight[expert]
        torch.testing.assert_close(found[a:b], x[a:b] @ whole.T, atol=1e-5, rtol=0)
    with torch.no_grad():
        before = model(tokens())
        merge(model)
        torch.testing.assert_close(model(tokens()), before, atol=2e-5, rtol=0)


def test_the_bias_that_balances_experts_is_frozen_too():
    model = tuned({"targets": ["layers.*.mixer.out"]}, layer(MOE, 1))
    assert model.layers["0"].feedforward.bias_rate is None


def test_dropout_is_of_training_alone():
    model = tuned({"rank": 4, "dropout": 0.5})
    with torch.no_grad():
        assert torch.equal(model(tokens()), model(tokens()))
        model.train()
        assert not torch.equal(model(tokens()), model(tokens()))


def test_further_weights_can_be_trained():
    model = tuned({"targets": ["layers.*.mixer.out"], "trainable": ["**norm", "embedding"]})
    learned = {n for n, p in model.named_parameters() if p.requires_grad and "updates" not in n}
    assert learned == {n for n, _ in base().named_parameters() if "norm" in n or n == "embedding.weight"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ["layers.*.mixer.qvk"]}, r"'layers\.\*\.mixer\.qvk' fits no module.*layers\.\*\.mixer\.qkv"),
        ({"targets": {"layers.*.mixer.qkv.k": 17}}, r"rank 17 .* is more than layers\.0\.mixer\.qkv\.k has: 16"),
        ({"targets": ["head"]}, r"'head' fits head, which cannot have lora"),
        ({"targets": ["layers.*.mixer_norm"]}, r"cannot have lora"),
        ({"method": "adapter", "targets": ["layers.*.mixer.out"]}, r"cannot have adapter"),
        ({"trainable": ["embeding"]}, r"fits no weight.*embedding"),
        ({"method": "ia3", "rank": 3}, r"rank.*no meaning with method=ia3"),
        ({"method": "lora", "placement": "parallel"}, r"placement.*no meaning with method=lora"),
    ],
)
def test_what_cannot_be_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        prepare(base(), resolve(FinetuneConfig, config))


def test_experts_cannot_have_every_method():
    with pytest.raises(ConfigError, match=r"feedforward\.down, which cannot have dora"):
        tuned({"method": "dora", "targets": ["layers.*.feedforward.down"]}, layer(MOE, 1))


def test_the_last_pattern_that_fits_decides():
    model = tuned({"targets": {"layers.**": 4, "layers.*.mixer.qkv.q": 2}})
    ranks = {name: update.rank for name, update in model.layers["0"].mixer.qkv.updates.items()}
    assert ranks == {"q": 2, "k": 4, "v": 4}
    assert ATTENTION["heads"] == 4
