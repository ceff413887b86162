"""Activation checkpointing and compilation: the same gradients, from recomputed or compiled layers."""

import gc
import itertools
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_zoo import gradients, make_loader, make_model, training_config

from treadle.attention import AttentionContext
from treadle.config import resolve
from treadle.errors import ConfigError
from treadle.parallel import activation_offload
from treadle.parallel import compile as compiling
from treadle.parallel.compile import compile_layers
from treadle.train.config import TrainingConfig
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import cross_entropy

MODES = ["none", "selective", "full"]
CASES = [
    "selective",
    {"kind": "selective", "matmuls": 1},
    {"kind": "selective", "matmuls": None},
    "full",
    {"kind": "full", "every": 2},
    {"kind": "full", "offload": True},
    "offload",
]
LAYERS = 2
MATMULS = 4  # of a layer: qkv, out, gate_up, down


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def model_with(mode, *, precision="fp32", backend=None, **changes):
    model = make_model(training_config(activation_checkpointing=mode, precision=precision), **changes)
    if backend:
        compile_layers(model.layers, backend=backend)
    return model


def run(model, isolate_documents=True):
    result = forward_backward(
        model, make_loader(isolate_documents=isolate_documents).micro_batches(0, 2), cross_entropy
    )
    return result.loss, gradients(model)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def everything_travels(monkeypatch):
    """To host memory, where that is asked for: tiny models have nothing that would be worth it."""
    monkeypatch.setattr(activation_offload, "SMALL", 0)


@pytest.mark.parametrize("mode", CASES, ids=str)
@pytest.mark.parametrize("isolate_documents", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputation_changes_no_bit(mode, isolate_documents, precision):
    expected = run(model_with("none", precision=precision), isolate_documents)
    found = run(model_with(mode, precision=precision), isolate_documents)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_parameter_names_stay():
    names = [name for name, _ in model_with("none").named_parameters()]
    for mode in MODES:
        assert [name for name, _ in model_with(mode).named_parameters()] == names


@pytest.mark.parametrize(("mode", "forwards"), [("none", 1), ("selective", 2), ("full", 2)])
def test_layers_are_really_run_again(mode, forwards):
    model = model_with(mode)
    calls: Counter[str] = Counter()
    for name, layer in model.layers.items():
        layer.mixer_norm.register_forward_hook(lambda *_, name=name: calls.update([name]))
    forward_backward(model, [make_loader().batch(0)], cross_entropy)
    assert calls == {"0": forwards, "1": forwards}


# In full mode PyTorch stops a layer's recomputation once it has all that was asked for, so `down` is not run again.
@pytest.mark.parametrize(("mode", "attentions", "matmuls"), [("selective", 0, 2), ("full", 1, MATMULS - 1)])
def test_selective_keeps_attention_and_every_other_matmul(mode, attentions, matmuls):
    counts = {}
    for each in ("none", mode):
        with CountOperations() as operations:
            run(model_with(each), isolate_documents=False)
        counts[each] = operations.seen
    steps = 2  # micro-batches
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert counts["none"][attention] == steps * LAYERS
    assert counts[mode][attention] - counts["none"][attention] == attentions * steps * LAYERS
    again = counts[mode]["mm"] - counts["none"]["mm"]
    assert 0 < again <= matmuls * steps * LAYERS


@pytest.mark.parametrize("mode", MODES)
def test_compiled_layers_equal_eager_ones(mode):
    loss, expected = run(model_with("none"))
    compiled_loss, found = run(model_with(mode, backend="aot_eager_decomp_partition"))
    torch.testing.assert_close(compiled_loss, loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_equal_layers_share_one_compiled_function(mode):
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    layers = [make_model().config.layers[0].model_copy(update={"repeat": 6})]
    deep = model_with(mode, layers=layers)
    compile_layers(deep.layers, backend=count)  # type: ignore[arg-type]
    batch = make_loader().batch(0)
    with torch.no_grad():
        deep.hidden(batch.tokens_BS, batch.context)
    assert len(frames) == 1


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_no_recomputation(mode):
    model, batch = model_with(mode), make_loader().batch(0)
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch.tokens_BS, batch.context), model_with("none")(batch.tokens_BS, batch.context), rtol=0, atol=0
        )


def test_a_compiled_layer_keeps_nothing_that_is_cheap_to_form_again():
    """Of a gated layer: its input, what attention adds to it, q, k, v, attention's output, gate and up."""
    model = model_with("none", precision="bf16", backend="aot_eager_decomp_partition")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and x.dtype == torch.bfloat16:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    layer, dim = model.layers["0"], model.config.dim
    context = model.with_tables(AttentionContext.causal(2, 64))
    x_BSD = torch.randn(2, 64, dim, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(x_BSD, context)
    mixer, wide = layer.mixer, layer.feedforward.gate_up.weight.shape[0]
    heads = (2 * mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim
    assert sum(kept.values()) <= 2 * 64 * (2 * dim + heads + wide) * 2


class Storages(TorchDispatchMode):
    """Bytes of what a forward has made and something still holds, but for views of weights, and copies on the host."""

    def __init__(self, model, host):
        super().__init__()
        self.made, self.host = {}, host
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return found

    def bytes(self):
        gc.collect()
        apart = self.weights | {tensor.untyped_storage()._cdata for tensor in self.host}
        # PyTorch keeps a storage's Python object alive as long as the storage itself.
        return sum(size for key, (alive, size) in self.made.items() if alive() is not None and key not in apart)


def held(monkeypatch, mode, layers=4):
    """Bytes that wait for the backward, without those that wait on the host; and the latter."""
    host, on_host = [], activation_offload._on_host

    def copied(tensor):
        host.append(on_host(tensor))
        return host[-1]

    monkeypatch.setattr(activation_offload, "_on_host", copied)
    model = model_with(mode, layers=[make_model().config.layers[0].model_copy(update={"repeat": layers})])
    batch = make_loader(isolate_documents=False).batch(0)
    with Storages(model, host) as storages:
        hidden = model.hidden(batch.tokens_BS, batch.context)
    del batch
    found = storages.bytes(), sum(tensor.numel() for tensor in host)
    assert hidden.requires_grad  # and so holds all of it
    return found


def test_less_is_held(monkeypatch):
    found = {str(case): held(monkeypatch, case)[0] for case in ["none", *CASES]}
    order = [
        "full",
        "{'kind': 'selective', 'matmuls': None}",
        "selective",
        "{'kind': 'selective', 'matmuls': 1}",
        "none",
    ]
    for less, more in itertools.pairwise(order):
        assert found[less] < found[more], found
    half = (found["full"] + found["none"]) / 2
    assert found["{'kind': 'full', 'every': 2}"] == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(("mode", "plain"), [("offload", "none"), ({"kind": "full", "offload": True}, "full")])
def test_what_was_held_is_on_the_host(monkeypatch, mode, plain):
    """All of it, but that of the last layer, and what is outside of layers."""
    layers = 8
    total, nothing = held(monkeypatch, plain, layers)
    assert nothing == 0
    here, host = held(monkeypatch, mode, layers)
    each = (held(monkeypatch, plain, 2 * layers)[0] - total) / layers  # of one layer
    assert each > 0
    assert total - here == pytest.approx((layers - 1) * each, rel=0.25)
    assert host >= total - here


def test_what_waits_is_freed_with_the_backward(monkeypatch):
    kept = []
    plain = activation_offload._Kept.__init__

    def noted(self, *arguments):
        plain(self, *arguments)
        kept.append(weakref.ref(self))

    monkeypatch.setattr(activation_offload._Kept, "__init__", noted)
    model = model_with("offload")
    batch = make_loader().batch(0)
    loss = model.hidden(batch.tokens_BS, batch.context).square().sum()
    assert [alive() is not None for alive in kept] == [True] * LAYERS
    loss.backward()
    assert [alive() is not None for alive in kept] == [False] * LAYERS


class Kept:
    """Bytes that compiled layers hand to autograd, weights left out."""

    def __init__(self):
        self.bytes = 0

    def __call__(self, tensor):
        self.bytes += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()
        return tensor


def kept_and_step(monkeypatch, mode):
    monkeypatch.setitem(compiling.compile_layers.__kwdefaults__, "backend", "aot_eager")
    torch._dynamo.reset()
    model = make_model(training_config(activation_checkpointing=mode, compile=True))
    batch, kept = make_loader().batch(0), Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        model.hidden(batch.tokens_BS, batch.context)
    return kept.bytes, run(model)


def test_a_budget_is_kept_by_the_compiler(monkeypatch):
    expected = run(model_with("none"))
    found = []
    for share in (0, 0.3, 0.6, 1):
        kept, step = kept_and_step(monkeypatch, {"kind": "budget", "share": share})
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-6)
        found.append(kept)
        assert torch._functorch.config.activation_memory_budget == 1.0, "the next run of this process has its own"
    assert found == sorted(set(found)), "each share keeps more than the one before"
    assert found[-1] == kept_and_step(monkeypatch, "none")[0]


@pytest.mark.parametrize("mode", ["offload", {"kind": "full", "offload": True}], ids=str)
def test_compiled_layers_hand_over_what_they_keep(monkeypatch, mode):
    expected = run(model_with("none"))
    kept, step = kept_and_step(monkeypatch, mode)
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-6)
    assert kept < 0.2 * kept_and_step(monkeypatch, "none")[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("half", "unknown kind 'half'"),
        ({"kind": "full", "every": 0}, "activation_checkpointing.every: expected int > 0"),
        ({"kind": "budget", "share": 1.5}, "activation_checkpointing.share: "),
        ({"kind": "budget"}, "training.compile is false; set it to true"),
    ],
)
def test_what_cannot_be_is_refused(value, message):
    plain = {"steps": 1, "sequence_length": 16, "batch_size": 1, "compile": False}
    with pytest.raises(ConfigError, match=message):
        resolve(TrainingConfig, {**plain, "activation_checkpointing": value})
