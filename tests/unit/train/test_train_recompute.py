"""Activation checkpointing and compilation: the same gradients, from recomputed or compiled layers."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_zoo import gradients, make_loader, make_model, training_config

from treadle.attention import AttentionContext
from treadle.parallel.compile import compile_layers
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import cross_entropy

MODES = ["none", "selective", "full"]
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


@pytest.mark.parametrize("mode", ["selective", "full"])
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
