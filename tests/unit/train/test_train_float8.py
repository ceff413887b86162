"""fp8: each matmul against the same operands rounded by hand, in float64; and a run whose loss follows that of bf16."""

import math

import pytest
import torch
from train_zoo import gradients, make_loader, make_model, make_state, spec, training_config

from treadle.errors import ConfigError
from treadle.nn.linear import Linear
from treadle.parallel import float8
from treadle.parallel.config import ParallelConfig
from treadle.parallel.float8 import Float8Linear
from treadle.parallel.mesh import Mesh
from treadle.train.forward_backward import forward_backward
from treadle.train.loop import Callback, Loop
from treadle.train.losses import cross_entropy
from treadle.train.schedules import ConstantConfig
from treadle.train.setup import build_model

# exponent of the smallest normal number, bits after the point, largest number
FORMATS = {torch.float8_e4m3fn: (-6, 3, 448.0), torch.float8_e5m2: (-14, 2, 57344.0)}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rounded(x, dtype):
    """x as it is after fp8, in float64: scaled to the format's range, rounded to its nearest number, ties to even."""
    lowest, bits, largest = FORMATS[dtype]
    scale = x.abs().max().float() / largest
    y = (x.float() * (1 / scale)).double()  # as on the device: where x is bf16, ties are common
    exponent = torch.frexp(y)[1].double().sub(1).clamp(min=lowest)
    step = torch.exp2(exponent - bits)
    return (y / step).round() * step * scale.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 32), (3, 7, 32)], ids=str)  # 21 rows are no multiple of 16
def test_a_linear_layer_is_that_of_rounded_operands(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(32, 48, bias=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    layer.__class__ = Float8Linear
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    dy = 1e-4 * torch.randn((*shape[:-1], 48), generator=generator).to(dtype)
    y = layer(x)
    y.backward(dy)
    # What fp8 is made of has the compute dtype.
    x8, w8 = (rounded(t.detach().to(dtype), torch.float8_e4m3fn) for t in (x, layer.weight))
    dy8 = rounded(dy, torch.float8_e5m2)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    close(y, x8 @ w8.t() + layer.bias.double(), 2 * tolerance)  # rounded before and after the bias
    close(x.grad, dy8 @ w8, tolerance)
    close(layer.weight.grad, dy8.flatten(0, -2).t() @ x8.flatten(0, -2), tolerance)
    close(layer.bias.grad, dy.double().flatten(0, -2).sum(0), 2 * tolerance)
    assert layer.weight.grad.dtype == torch.float32
    assert y.dtype == x.grad.dtype == dtype


def close(found, expected, tolerance):
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_zeros_stay_zeros_and_infinities_are_seen():
    layer = Linear(16, 16)
    torch.nn.init.normal_(layer.weight)
    layer.__class__ = Float8Linear
    assert torch.equal(layer(torch.zeros(16, 16)), torch.zeros(16, 16))
    assert not layer(torch.full((16, 16), math.inf)).isfinite().any()


def test_which_layers_are_swapped():
    shared = {"kind": "gated", "dim": 24}
    moe = {"kind": "moe", "experts": 4, "top_k": 2, "dim": 16, "shared": shared, "shared_gate": True}
    layers = [
        {"kind": "pre_norm", "mixer": {"kind": "attention", "heads": 2}, "feedforward": moe},
        {
            "kind": "pre_norm",
            "mixer": {"kind": "gated_delta", "heads": 2, "head_dim": 16},
            "feedforward": {"kind": "gated", "dim": 64},
        },
    ]
    model = make_model(training_config(fp8=True), layers=layers)
    found = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert found == {
        "layers.0.mixer.qkv",
        "layers.0.mixer.out",
        "layers.0.feedforward.shared.gate_up",
        "layers.0.feedforward.shared.down",
        "layers.1.feedforward.gate_up",
        "layers.1.feedforward.down",
    }
    down = model.layers["0"].feedforward.shared.down  # 24 inputs: swapped, and multiplied as ever
    x = torch.randn(3, 24)
    assert torch.equal(down(x), torch.nn.functional.linear(x, down.weight))


def step(backend=None, **changes):
    model = make_model(training_config(fp8=True, precision="bf16", **changes))
    if backend is not None:
        for layer in model.layers.values():
            layer.compile(backend=backend, fullgraph=True)
    result = forward_backward(model, make_loader(isolate_documents=False).micro_batches(0, 2), cross_entropy)
    return result.loss, gradients(model)


@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
def test_recomputation_changes_no_bit(mode):
    torch.testing.assert_close(step(activation_checkpointing=mode), step(), rtol=0, atol=0)


def test_layers_compile_without_a_break():
    torch.testing.assert_close(step("aot_eager"), step(), rtol=0, atol=1e-4)


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def step(self, loop, record):
        self.losses.append(record.loss)


def losses(**changes):
    config = training_config(steps=60, precision="bf16", **changes)
    seen = Losses()
    loop = Loop(make_state(config), config, ConstantConfig(), cross_entropy, [seen])
    loop.run(make_loader().iterate_micro(4, 0, 60))
    return seen.losses


def test_the_loss_follows_that_of_bf16():
    expected, found = losses(), losses(fp8=True)
    assert found != expected
    assert expected[-1] < expected[0] - 0.5
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) < 0.05


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [((8, 0), None, "has compute capability 8.0, and fp8 needs 8.9"), ((9, 4), "6.2", "NVIDIA")],
)
def test_hardware_without_it_is_refused(monkeypatch, capability, hip, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.version, "hip", hip)
    mesh = Mesh(device=torch.device("cuda"))
    with pytest.raises(ConfigError, match=f"training.fp8: .*{reason}.*; set it to false"):
        build_model(spec(), training_config(fp8=True), seed=0, mesh=mesh)


def test_hardware_with_it_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert float8.not_float8_because(torch.device("cuda")) is None
    assert "mps" in float8.not_float8_because(torch.device("mps"))


def test_what_has_nothing_for_it_is_refused():
    attention, gated = {"kind": "attention", "heads": 2}, {"kind": "gated", "dim": 64}
    odd = {"kind": "pre_norm", "mixer": attention, "feedforward": gated}
    with pytest.raises(ConfigError, match=r"training.fp8: no linear layer .* multiples of 16"):
        make_model(training_config(fp8=True), dim=36, layers=[odd])
    with pytest.raises(ConfigError, match=r"training.fp8: .*async_tensor"):
        build_model(spec(), training_config(fp8=True), seed=0, parallel=ParallelConfig(async_tensor=True))
