"""Latent attention: its two forms are one, whatever the context; its facts by hand; what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from treadle import cli
from treadle.attention import AttentionContext, TokenCache
from treadle.config import Config, resolve, to_dict
from treadle.errors import ConfigError
from treadle.inference.generate import stream
from treadle.nn import flops
from treadle.nn.latent_attention import LatentAttention, LatentAttentionConfig
from treadle.nn.roles import parameter_roles
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.parallel.activation_checkpointing import CheckpointingConfig, apply_activation_checkpointing

D, H, C, N, R, V = 12, 3, 16, 8, 4, 6
SIZES: dict[str, Any] = {"heads": H, "kv_rank": C, "nope_dim": N, "rope_dim": R, "value_dim": V}
YARN = {"kind": "rope", "layout": "interleaved", "scaling": {"kind": "yarn", "original_length": 8}}
KINDS: list[dict[str, Any]] = [
    {},
    {"q_rank": 10, "position": YARN},
    {"q_rank": 10, "position": None, "window": 5, "bias": True, "scale": 0.3},
    {"softcap": 2.0, "norm": "layer", "value_dim": 14},
]


class Whole(Config):
    model: TransformerConfig


def spec(**mixer: Any) -> dict[str, Any]:
    layer = {"mixer": {"kind": "latent_attention", **SIZES, **mixer}, "feedforward": {"kind": "dense", "dim": 8}}
    layers = [{"kind": "pre_norm", "repeat": 2, **layer}]
    return {"dim": D, "vocab_size": 64, "max_length": 32, "layers": layers, "init": {"kind": "normal", "std": 0.3}}


def build(**mixer: Any) -> Transformer:
    model: Transformer = resolve(TransformerConfig, spec(**mixer)).build()
    return model.initialise(0)


def block_of(**changes: Any) -> LatentAttention:
    """One block in float64, no weight of it zero or one."""
    torch.manual_seed(0)
    config = LatentAttentionConfig.model_validate({**SIZES, **changes})
    block: LatentAttention = config.build(D, 64).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def inputs(block: LatentAttention, S: int, T: int) -> tuple[torch.Tensor, ...]:
    """What the two forms take: q_BSHN, q_BSHR, kept_BTM."""
    shapes = [(2, S, H, block.nope_dim), (2, S, H, block.rope_dim), (2, T, block.kv_rank + block.rope_dim)]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("S", "T"), [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("changes", KINDS)
def test_the_absorbed_form_equals_the_expanded_one(changes: dict[str, Any], S: int, T: int, backend: str) -> None:
    block = block_of(**changes)
    q_BSHN, q_BSHR, kept_BTM = inputs(block, S, T)
    positions_BS = torch.arange(T - S, T).expand(2, S)
    cache = TokenCache(2, T, [], torch.float64, "cpu")
    cache.length = T
    context = AttentionContext(positions_BS, backend=backend, cache=cache if T > S else None)
    results = []
    for form in ("expanded", "absorbed"):
        latest = kept_BTM.split((C, R), dim=-1) if form == "expanded" else (kept_BTM,)
        out_BSHV = getattr(block, form)(q_BSHN, q_BSHR, *latest, context)
        leaves = (q_BSHN, q_BSHR, kept_BTM, block.kv_up.weight)
        results.append((out_BSHV, *torch.autograd.grad(out_BSHV.square().sum(), leaves)))
    for expanded, absorbed in zip(*results, strict=True):
        assert expanded.abs().max() > 0.1
        assert (expanded - absorbed).abs().max() < 1e-10


@pytest.mark.parametrize("S", [1, 3, 30, 64])
@pytest.mark.parametrize("T", [64, 100])
@pytest.mark.parametrize("rank", [4, 16, 64])
def test_the_cheaper_form_is_chosen(rank: int, S: int, T: int) -> None:
    block = block_of(kv_rank=rank)
    q_BSHN, q_BSHR, kept_BTM = inputs(block, S, T)
    context = AttentionContext(torch.arange(T - S, T).expand(2, S), backend="reference", cache=object())
    with FlopCounterMode(display=False) as expanded:
        block.expanded(q_BSHN, q_BSHR, *kept_BTM.split((rank, R), dim=-1), context)
    with FlopCounterMode(display=False) as absorbed:
        block.absorbed(q_BSHN, q_BSHR, kept_BTM, context)
    cheaper = absorbed.get_total_flops() < expanded.get_total_flops()
    assert block.absorbing_is_cheaper(S, T) == cheaper


def test_deepseeks_sizes_decode_absorbed_and_prefill_expanded() -> None:
    sizes = {"heads": 128, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    with torch.device("meta"):
        block = LatentAttentionConfig.model_validate(sizes).build(64, 64)
    choices = [block.absorbing_is_cheaper(*shape) for shape in ((1, 2), (1, 4096), (100, 4096), (512, 4096), (9, 9))]
    assert choices == [True, True, True, False, False]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [[20], [7, 1, 1, 11], [1] * 20, [6, 3, 11]])
@pytest.mark.parametrize("mixer", KINDS)
def test_a_cache_gives_the_same_as_the_whole_row(mixer: dict[str, Any], sizes: list[int], backend: str) -> None:
    block = block_of(**mixer)
    x_BSD = torch.randn(2, 20, D, dtype=torch.float64)
    whole_BSD = block(x_BSD, AttentionContext.causal(2, 20, backend="reference"))
    cache = block.make_cache(2, 20, torch.float64, torch.device("cpu"))
    used, absorbed = [], block.absorbed
    block.absorbed = lambda *arguments: used.append(arguments[0].shape[1]) or absorbed(*arguments)  # type: ignore
    start, pieces = 0, []
    for size in sizes:
        positions_BS = torch.arange(start, start + size).expand(2, size)
        context = AttentionContext(positions_BS, backend=backend, cache=cache)
        pieces.append(block(x_BSD[:, start : start + size], context))
        start += size
    assert (torch.cat(pieces, dim=1) - whole_BSD).abs().max() < 1e-10
    expected = [size for size in sizes[1:] if size < 11 or block.value_dim > V]
    assert used == expected, "new tokens are absorbed; first calls are not, nor long ones if values are small"
    assert sum(buffer[0, 0].numel() for buffer in cache.buffers) == block.cache_elements() == C + R


@pytest.mark.parametrize("mixer", KINDS)
def test_packed_documents_equal_each_document_alone(mixer: dict[str, Any]) -> None:
    block, lengths = block_of(**mixer), [1, 12, 5, 2]
    x_BSD = torch.randn(1, 20, D, dtype=torch.float64)
    documents_BS = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed_BSD = block(x_BSD, AttentionContext.packed(documents_BS))
    for got_BSD, alone_BSD in zip(packed_BSD.split(lengths, 1), x_BSD.split(lengths, 1), strict=True):
        expected_BSD = block(alone_BSD, AttentionContext.causal(1, alone_BSD.shape[1]))
        assert (got_BSD - expected_BSD).abs().max() < 1e-10


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """The compiler counts what it made of a function, in other tests too, and gives up beyond its limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mixer", KINDS)
def test_layers_compile_without_a_break(mixer: dict[str, Any]) -> None:
    model, tokens_BS = build(**mixer), torch.randint(0, 64, (2, 20))
    context = AttentionContext.packed(torch.tensor([[0] * 12 + [1] * 8, [0] * 20]))
    expected = model(tokens_BS, context)
    for layer in model.layers.values():
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(tokens_BS, context), expected)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("mixer", KINDS[:2])
def test_recomputation_changes_no_bit(mixer: dict[str, Any], mode: Any) -> None:
    tokens_BS, gradients = torch.randint(0, 64, (2, 20)), []
    for each in ("none", mode):
        model = build(**mixer)
        apply_activation_checkpointing(model.layers, CheckpointingConfig.model_validate(each))
        model(tokens_BS).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("mixer", KINDS)
def test_generation_is_the_argmax_of_the_whole_forward(mixer: dict[str, Any]) -> None:
    model, tokens = build(**mixer).eval(), [5, 9, 2]
    found = [token for (token,) in stream(model, tokens, max_new_tokens=12, temperature=0)]
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens[3:]
    assert len(set(found)) > 2


def test_layers_share_one_table() -> None:
    model = build(position=YARN)
    context = model.with_tables(AttentionContext.causal(1, 4))
    assert [tuple(t.shape) for tables in context.tables.values() for t in tables] == [(1, 4, 1, R)] * 2


@pytest.mark.parametrize("q_rank", [None, 10])
def test_facts_by_hand(q_rank: int | None) -> None:
    model = build(q_rank=q_rank, bias=True)
    queries = H * (N + R) * D if q_rank is None else 10 * D + H * (N + R) * 10
    matrices = queries + (C + R) * D + H * (N + V) * C + D * H * V
    vectors = (q_rank or 0) * 2 + 2 * C + R + D  # norms of the compressed; biases of down and out
    layer = matrices + vectors + 2 * D + 2 * D * 8
    assert flops.parameter_count(model) == 2 * layer + 2 * 64 * D + D
    per_token = 2 * (matrices + 2 * D * 8) + 2 * H * (N + R + V) * 16
    assert flops.forward_flops(model, 32) == 2 * per_token + 2 * 64 * D
    assert flops.cache_elements(model) == 2 * (C + R)
    roles = {name.removeprefix("layers.0.mixer."): role for name, role in parameter_roles(model).items()}
    expected = {"down.weight": "replicate", "q_up.weight": "column", "kv_up.weight": "column", "out.weight": "row"}
    assert expected.items() <= roles.items()


def test_flops_of_a_window_count_what_is_seen() -> None:
    for window, length in [(4, 16), (16, 16), (100, 16), (1, 16)]:
        seen = sum(min(i + 1, window) for i in range(length)) / length
        claimed = block_of(window=window).mixing_flops(length) / (2 * H * (N + R + V))
        assert abs(claimed - seen) <= 0.5


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"rope_dim": 5}, "rope_dim", "5 is odd; rotary positions pair channels"),
        ({"position": {"kind": "rope", "partial": 0.3}}, "position.partial", "0.3 of head dim 4 is 1 channels"),
        ({"position": {"kind": "alibi"}}, "position.kind", "rope"),
        ({"kv_rank": 0}, "kv_rank", "> 0"),
        ({"value_dim": None}, "value_dim", "> 0, got null"),
        ({"q_lora_rank": 5}, "q_lora_rank", "Did you mean 'q_rank'"),
        ({"norm": "rmsnorm"}, "norm", "unknown kind"),
        (
            {"rope_dim": 2, "position": {"kind": "rope", "scaling": {"kind": "dynamic_ntk", "factor": 2}}},
            "position.scaling.kind",
            "at least 4 rotated",
        ),
    ],
)
def test_impossible_sizes_are_explained(change: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Whole, {"model": spec(**change)})
    assert f"model.layers[0].mixer.{key}" in str(caught.value)
    assert message in str(caught.value)


def test_without_position_an_odd_rope_dim_is_possible() -> None:
    assert build(rope_dim=5, position=None)(torch.tensor([[1, 2]])).shape == (1, 2, 64)


def test_it_survives_yaml_and_is_shown(tmp_path: Path) -> None:
    config = resolve(TransformerConfig, spec(**KINDS[1]))
    assert resolve(TransformerConfig, to_dict(config)) == config
    path = tmp_path / "model.yaml"
    path.write_text(
        "{dim: 12, vocab_size: 64, max_length: 32, layers: [{kind: pre_norm, feedforward: {kind: dense, dim: 8}, "
        "mixer: {kind: latent_attention, heads: 3, q_rank: 10, kv_rank: 16, nope_dim: 8, rope_dim: 4, value_dim: 6}}]}"
    )
    result = CliRunner().invoke(cli.app, ["model", "show", str(path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert f"{2 * (C + R)} cache bytes" in lines[0]
    for shown in ("down  Linear  [30 × 12] replicate", "kv_up  Linear  [42 × 16] column", "q_norm  RMSNorm"):
        assert any(shown in line for line in lines), result.output
