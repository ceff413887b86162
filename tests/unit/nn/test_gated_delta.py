"""Gated delta net as a mixer: documents, caches, how it starts, and every way to run it.

The recurrence is tested in tests/unit/kernels, the module against transformers' in tests/parity.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from treadle.attention import AttentionContext
from treadle.config import Config, resolve, to_dict
from treadle.errors import ConfigError
from treadle.inference.generate import stream
from treadle.nn import flops
from treadle.nn.gated_delta import GatedDelta, GatedDeltaConfig
from treadle.nn.roles import parameter_roles
from treadle.nn.short_convolution import ShortConvolution
from treadle.nn.store import build_meta, load_model, save_model
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.parallel.activation_checkpointing import CheckpointingConfig, apply_activation_checkpointing
from treadle.parallel.compile import compile_layers
from treadle.train.muon import Muon
from treadle.train.optimizers import AdamWConfig, MuonConfig

MIXER = {"kind": "gated_delta", "heads": 2, "value_heads": 4, "head_dim": 8, "value_dim": 12}


class Whole(Config):
    model: TransformerConfig


def spec(mixer: dict[str, Any] = MIXER, *, hybrid: bool = False) -> dict[str, Any]:
    """Two recurrent layers, or three and an attention layer."""
    layer = {"kind": "pre_norm", "feedforward": {"kind": "gated", "dim": 24}}
    recurrent, attention = {**layer, "mixer": mixer}, {**layer, "mixer": {"kind": "attention", "heads": 2}}
    layers: list[Any] = [{**recurrent, "repeat": 2}]
    if hybrid:
        layers = [{"kind": "cycle", "layers": [{**recurrent, "repeat": 3}, attention]}]
    return {"dim": 16, "vocab_size": 64, "max_length": 256, "layers": layers}


def build(*, hybrid: bool = False, std: float = 0.3, dtype: torch.dtype = torch.float64) -> Transformer:
    """Weights so large that every part matters."""
    source = {**spec(hybrid=hybrid), "init": {"kind": "normal", "std": std, "scale_residual": False}}
    model: Transformer = resolve(TransformerConfig, source).build().initialise(0).to(dtype)
    model.dtype = dtype
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))


def packed(lengths: list[int], rows: int = 1) -> AttentionContext:
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return AttentionContext.packed(documents.expand(rows, -1))


# Documents


def packed_and_alone(model: Transformer, lengths: list[int]) -> tuple[Tensor, Tensor]:
    tokens_BS = tokens(1, sum(lengths))
    with torch.no_grad():
        alone = [model(piece) for piece in tokens_BS.split(lengths, dim=1)]
        return model(tokens_BS, packed(lengths)), torch.cat(alone, dim=1)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4))
def test_packed_documents_are_computed_as_if_alone(lengths: list[int]) -> None:
    found, alone = packed_and_alone(build(), lengths)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("hybrid", [False, True])
def test_packed_documents_in_float32(hybrid: bool) -> None:
    found, alone = packed_and_alone(build(hybrid=hybrid, std=0.1, dtype=torch.float32), [3, 1, 70, 64, 2, 40])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_gradients_of_packed_documents_are_those_of_each_alone() -> None:
    lengths, tokens_BS = [1, 70, 3, 30], tokens(1, 104)
    together, apart = build(), build()
    together(tokens_BS, packed(lengths)).square().mean().backward()
    for piece in tokens_BS.split(lengths, dim=1):
        (apart(piece).square().sum() / (104 * 64)).backward()
    for mine, alone in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, alone.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_the_convolution_is_conv1d_of_each_document(width: int) -> None:
    conv = ShortConvolution(6, width)
    nn.init.normal_(conv.weight)
    lengths = [1, 9, 2, 3, 20]
    x = torch.randn(2, sum(lengths), 6)
    wanted = [F.conv1d(F.pad(piece.mT, (width - 1, 0)), conv.weight, groups=6).mT for piece in x.split(lengths, dim=1)]
    found = conv(x, packed(lengths, rows=2).positions_BS)
    torch.testing.assert_close(found, torch.cat(wanted, dim=1))


def test_no_token_sees_a_later_one() -> None:
    model, tokens_BS = build(), tokens(1, 90)
    changed_BS = tokens_BS.clone()
    changed_BS[0, 66] = (changed_BS[0, 66] + 1) % 64
    different = (model(tokens_BS) - model(changed_BS)).abs().amax(-1)[0] > 1e-5
    assert not different[:66].any()
    assert different[66:70].all()


# Inference


def run_cached(model: Transformer, tokens_BS: Tensor, sizes: list[int], positions_BS: Tensor | None = None) -> Tensor:
    """The row in pieces of these sizes, through a cache."""
    cache, outputs, start = model.make_cache(tokens_BS.shape[0], tokens_BS.shape[1]), [], 0
    if positions_BS is None:
        positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    with torch.inference_mode():
        for size in sizes:
            piece = slice(start, start + size)
            outputs.append(model(tokens_BS[:, piece], AttentionContext(positions_BS[:, piece], cache=cache)))
            start += size
    assert start == tokens_BS.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("sizes", [[1] * 9, [70, *[1] * 5], [2, 1, 64, 3, 5], [75]])
@pytest.mark.parametrize("hybrid", [False, True])
def test_pieces_with_a_cache_are_the_whole_row(sizes: list[int], hybrid: bool) -> None:
    model, tokens_BS = build(hybrid=hybrid), tokens(2, sum(sizes))
    torch.testing.assert_close(run_cached(model, tokens_BS, sizes), model(tokens_BS), rtol=0, atol=1e-11)


def test_position_zero_begins_a_document_within_a_cache_too() -> None:
    model, tokens_BS, context = build(), tokens(1, 40), packed([17, 2, 21])
    found = run_cached(model, tokens_BS, [10, 8, 1, 1, 20], context.positions_BS)
    torch.testing.assert_close(found, model(tokens_BS, context), rtol=0, atol=1e-11)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("prompt", [[5], [5, 9, 2, 33, 7]])
def test_generation_is_the_argmax_of_the_whole_forward(hybrid: bool, prompt: list[int]) -> None:
    model = build(hybrid=hybrid, dtype=torch.float32).eval()
    found = [token for (token,) in stream(model, prompt, max_new_tokens=20, temperature=0)]
    so_far = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            so_far.append(int(model(torch.tensor([so_far]))[0, -1].argmax()))
    assert found == so_far[len(prompt) :]
    assert len(set(found)) > 3


def test_a_cache_has_one_size_and_a_wide_state() -> None:
    model = build(dtype=torch.float32)
    model.dtype = torch.bfloat16
    state = model.make_cache(3, 1000)[0]
    assert state.state_BGKV.dtype == torch.float32
    assert state.past_BWE.dtype == torch.bfloat16
    assert state.state_BGKV.numel() + state.past_BWE.numel() == 3 * model.layers["0"].mixer.state_elements()
    addresses = state.state_BGKV.data_ptr(), state.past_BWE.data_ptr()
    model.layers["0"].mixer(torch.randn(3, 5, 16).bfloat16(), context_with(state, 3, 5))
    assert (state.state_BGKV.data_ptr(), state.past_BWE.data_ptr()) == addresses
    assert state.state_BGKV.any()


def context_with(state: Any, batch: int, length: int) -> AttentionContext:
    return AttentionContext(torch.arange(length).expand(batch, length), cache=state)


# Facts


def test_facts_by_hand() -> None:
    model = resolve(TransformerConfig, spec(hybrid=True)).build()
    mixer = model.layers["0"].mixer
    channels = 2 * 16 + 48
    assert flops.parameter_count(mixer) == 16 * (channels + 48 + 8) + 4 * channels + 4 + 4 + 12 + 48 * 16
    assert mixer.mixing_flops(7) == mixer.mixing_flops(10**6) == 4 * 6 * 8 * 12 + 2 * 4 * channels
    assert flops.cache_elements(model) == 2 * 16
    assert flops.state_elements(model) == 3 * (4 * 8 * 12 + 3 * channels)
    matrices = 16 * (channels + 48 + 8) + 48 * 16
    assert flops.forward_flops(mixer, 100) == 2 * matrices + mixer.mixing_flops(100)


def test_show_has_the_state(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from treadle import cli
    from treadle.config import to_yaml

    path = tmp_path / "model.yaml"
    shown = {}
    for hybrid in (True, False):
        path.write_text(to_yaml(resolve(TransformerConfig, spec(hybrid=hybrid))))
        shown[hybrid] = CliRunner().invoke(cli.app, ["model", "show", str(path)]).output.splitlines()
    each = 4 * 8 * 12 + 3 * 80
    assert f"64 cache bytes   {3 * each:,} state" in shown[True][0]
    assert f"FLOPs   {2 * each:,} state" in shown[False][0], "a cache of nothing is left out"
    assert "Per row: numbers kept in the state." in shown[True][-1]


def test_roles_and_optimizers() -> None:
    model = build()
    roles = {name.rpartition("mixer.")[2]: role for name, role in parameter_roles(model).items() if ".mixer." in name}
    column = dict.fromkeys(("A_log", "dt_bias", "qkvz.weight", "ba.weight", "conv.weight"), "column")
    assert roles == {**column, "norm.weight": "norm", "out.weight": "row"}
    muon, adamw = MuonConfig().build(model).optimizers
    assert isinstance(muon, Muon)
    names = {id(p): name for name, p in model.layers["0"].mixer.named_parameters()}
    stepped = {names[id(p)]: g["parts"] for g in muon.param_groups for p in g["params"] if id(p) in names}
    assert stepped == {"qkvz.weight": (16, 16, 48, 48), "ba.weight": (4, 4), "out.weight": ()}
    for optimizer in (adamw, AdamWConfig().build(model).optimizers[0]):
        for group in optimizer.param_groups:
            for name in (names[id(p)] for p in group["params"] if id(p) in names):
                vector = name in ("A_log", "dt_bias", "norm.weight")
                assert (group["weight_decay"] == 0) == vector, name


# How it starts


def test_decays_start_as_published() -> None:
    model = resolve(TransformerConfig, spec({"kind": "gated_delta", "heads": 512, "head_dim": 1})).build().initialise(3)
    A = torch.cat([layer.mixer.A_log.detach().exp() for layer in model.layers.values()]).sort().values
    dt = torch.cat([F.softplus(layer.mixer.dt_bias.detach()) for layer in model.layers.values()]).sort().values
    even = (torch.arange(1024) + 0.5) / 1024
    critical = 1.63 / math.sqrt(1024)  # Kolmogorov-Smirnov, 1%
    assert (A / 16 - even).abs().max() < critical
    assert ((dt / 1e-3).log() / math.log(100) - even).abs().max() < critical
    weight = model.layers["0"].mixer.conv.weight.detach().flatten().sort().values
    assert weight.abs().max() < 0.5
    even = (torch.arange(len(weight)) + 0.5) / len(weight)
    assert (weight + 0.5 - even).abs().max() < 1.63 / math.sqrt(len(weight))


def test_a_start_follows_from_seed_and_name_alone(tmp_path: Path) -> None:
    one, again, other = (resolve(TransformerConfig, spec()).build().initialise(seed) for seed in (7, 7, 8))
    meta = build_meta(resolve(TransformerConfig, spec())).to_empty(device="cpu").initialise(7)
    roles = parameter_roles(one)
    hybrid = dict(resolve(TransformerConfig, spec(hybrid=True)).build().initialise(7).named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
        assert torch.equal(parameter, dict(meta.named_parameters())[name])
        if name.startswith("layers") and roles[name] != "row":  # whose scale is the depth's
            assert torch.equal(parameter, hybrid[name])
        if "norm" not in name:
            assert not torch.equal(parameter, dict(other.named_parameters())[name]), name
    loaded = load_model(save_model(one, tmp_path))
    assert torch.equal(loaded(tokens(1, 9)), one(tokens(1, 9)))


@pytest.mark.parametrize("kind", ["normal", "fan_in"])
def test_it_starts_near_an_even_guess(kind: str) -> None:
    model = resolve(TransformerConfig, {**spec(), "init": kind}).build().initialise(0)
    tokens_BS = tokens(4, 100)
    loss = F.cross_entropy(model(tokens_BS[:, :-1]).flatten(0, 1), tokens_BS[:, 1:].flatten())
    assert abs(loss.item() - math.log(64)) < 0.8


# Every way to run it


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model: Transformer) -> tuple[Tensor, list[Tensor]]:
    tokens_BS = tokens(2, 80)
    loss = model(tokens_BS, packed([50, 1, 29], rows=2)).float().square().mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.usefixtures("_fresh_compiler")
def test_layers_compile_without_a_break() -> None:
    expected = loss_and_gradients(build(hybrid=True))
    model = build(hybrid=True)
    for layer in model.layers.values():
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_longer_row_is_no_larger_a_graph() -> None:
    sizes = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for length in (128, 640):
        torch._dynamo.reset()
        block = GatedDeltaConfig(heads=2).build(16, 640)
        compiled = torch.compile(block, backend=count, fullgraph=True, dynamic=False)
        compiled(torch.zeros(1, length, 16), AttentionContext.causal(1, length))
    assert sizes[0] == sizes[1]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_have_the_same_gradients(mode: Any, backend: str | None) -> None:
    expected = loss_and_gradients(build())
    model = build()
    apply_activation_checkpointing(model.layers, CheckpointingConfig.model_validate(mode))
    if backend is not None:
        compile_layers(model.layers, backend=backend)
    tolerance = 0 if backend is None else 1e-9
    torch.testing.assert_close(loss_and_gradients(model), expected, rtol=tolerance, atol=tolerance)


def test_bf16_computes_with_a_wide_state() -> None:
    exact, model = (build(std=0.1, dtype=torch.float32) for _ in range(2))
    model.dtype = torch.bfloat16
    tokens_BS = tokens(2, 200)
    rounded = model(tokens_BS)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact(tokens_BS)).norm() / exact(tokens_BS).norm() < 2e-2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    cached = run_cached(model, tokens_BS, [150, *[1] * 50])
    assert (cached.float() - rounded.float()).norm() / rounded.float().norm() < 2e-2


# Configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_heads": 3}, r"mixer.value_heads: 3 is no multiple of heads=2; try 2 or 4"),
        ({"heads": 3, "value_heads": None, "head_dim": None}, r"mixer.heads: 3 does not divide the model's dim=16"),
        ({"conv": 0}, r"mixer.conv"),
        ({"norm": "rmsnorm"}, r"mixer.norm.*unknown kind"),
        ({"kv_heads": 2}, r"mixer.kv_heads: unknown key"),
    ],
)
def test_impossible_mixers_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(Whole, {"model": spec({**MIXER, **change})})


def test_sizes_that_are_left_out() -> None:
    block = GatedDeltaConfig(heads=4).build(32, 64)
    assert isinstance(block, GatedDelta)
    assert (block.value_heads, block.head_dim, block.value_dim) == (4, 8, 8)
    config = resolve(TransformerConfig, spec(hybrid=True))
    assert resolve(TransformerConfig, to_dict(config)) == config
