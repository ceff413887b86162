"""Multi-token prediction as a part of the model: what it sees, what it costs, and that inference does without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treadle.attention import AttentionContext
from treadle.config import Config, resolve
from treadle.errors import ConfigError
from treadle.inference.generate import stream
from treadle.nn import flops
from treadle.nn.init import fill_normal
from treadle.nn.multi_token import ahead
from treadle.nn.roles import parameter_roles
from treadle.nn.store import build_meta, load_model, save_model
from treadle.nn.transformer import Transformer, TransformerConfig

DIM, VOCABULARY, HIDDEN = 16, 40, 24
LAYER = {
    "kind": "pre_norm",
    "mixer": {"kind": "attention", "heads": 4},
    "feedforward": {"kind": "gated", "dim": HIDDEN},
}
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2, 2, 2]])


def spec(depth: int = 2, **changes: Any) -> dict[str, Any]:
    plain = {"dim": DIM, "vocab_size": VOCABULARY, "max_length": 32, "layers": [{**LAYER, "repeat": 2}]}
    return {**plain, "multi_token": {"kind": "sequential", "depth": depth}, **changes}


def make(**changes: Any) -> Transformer:
    """In float64, with weights large enough that everything depends on everything."""
    options = {"init": {"kind": "normal", "std": 0.4}, **changes}
    model = resolve(TransformerConfig, spec(**options)).build().initialise(0).double()
    model.dtype = torch.float64
    return model


def draw(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, DOCUMENTS.shape, generator=torch.Generator().manual_seed(seed))


def further(model: Transformer, tokens: Tensor, context: AttentionContext) -> list[Tensor]:
    return model.further(model.hidden(tokens, context), tokens, context)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("packed", [True, False])
def test_ahead_stays_in_the_document(k: int, packed: bool) -> None:
    values = draw()
    context = AttentionContext.packed(DOCUMENTS) if packed else AttentionContext.causal(*DOCUMENTS.shape)
    documents = DOCUMENTS.tolist() if packed else [[0] * 10] * 2
    expected = [
        [row[i + k] if i + k < 10 and numbers[i + k] == numbers[i] else -100 for i in range(10)]
        for row, numbers in zip(values.tolist(), documents, strict=True)
    ]
    assert ahead(values, k, context).tolist() == expected


def test_no_counted_position_sees_another_document_or_its_own_target() -> None:
    """By gradients: h_k at position i reads the embeddings of its document's tokens up to i + k, and no other."""
    model, tokens, context = make(), draw(), AttentionContext.packed(DOCUMENTS)
    found = []
    model.embedding.register_forward_hook(lambda *arguments: found.append(arguments[-1]))
    for k, hidden_BSD in enumerate(further(model, tokens, context), start=1):
        for row, position in torch.nonzero(ahead(tokens, k, context) != -100).tolist():
            gradients = torch.autograd.grad(
                hidden_BSD[row, position].sum(), found[: k + 1], retain_graph=True, allow_unused=True
            )
            own = DOCUMENTS[row] == DOCUMENTS[row, position]
            for shift, gradient in enumerate(gradients):
                # The embedding is read `shift` tokens on: the one at place j of this lookup is of token j + shift.
                read = torch.zeros(DOCUMENTS.shape, dtype=torch.bool)
                read[row] = own & (torch.arange(10) <= position)
                if shift:
                    read &= ahead(tokens, shift, context) != -100
                assert gradient is not None
                assert torch.equal(gradient.abs().sum(-1) > 0, read), (k, row, position, shift)
    assert len(found) == 3


def test_documents_in_a_row_are_computed_as_if_alone() -> None:
    model, tokens, context = make(), draw(), AttentionContext.packed(DOCUMENTS)
    together = further(model, tokens, context)
    for row in range(2):
        for number in DOCUMENTS[row].unique():
            (where,) = torch.nonzero(DOCUMENTS[row] == number, as_tuple=True)
            if len(where) > 2:
                piece = tokens[row, where][None]
                alone = further(model, piece, AttentionContext.causal(*piece.shape))
                for k in (1, 2):
                    torch.testing.assert_close(together[k - 1][row, where[:-k]], alone[k - 1][0, :-k])


def test_inference_is_that_of_the_model_without() -> None:
    model, plain = make(), make(multi_token=None)
    assert {name for name, _ in plain.named_parameters()} < {name for name, _ in model.named_parameters()}
    calls: list[str] = []
    assert model.multi_token is not None
    for module in model.multi_token.modules():
        module.register_forward_hook(lambda *_: calls.append("called"))
    tokens = draw()
    assert torch.equal(model(tokens), plain(tokens))
    prompt = [3, 1, 4]
    generated = [list(stream(each, prompt, max_new_tokens=8, temperature=0)) for each in (model, plain)]
    assert generated[0] == generated[1]
    assert calls == []
    assert plain.further(plain.hidden(tokens), tokens, AttentionContext.causal(2, 10)) == []


def test_costs_by_hand() -> None:
    model, plain = make(), make(multi_token=None)
    matrices = 4 * DIM * DIM + 3 * DIM * HIDDEN
    module = matrices + 2 * DIM + 2 * DIM * DIM + 3 * DIM
    assert flops.parameter_count(model) == flops.parameter_count(plain) + 2 * module
    assert flops.forward_flops(model, 32) == flops.forward_flops(plain, 32)
    assert flops.cache_elements(model) == flops.cache_elements(plain) == 2 * 2 * DIM
    once = 2 * (matrices + 2 * DIM * DIM + VOCABULARY * DIM) + 4 * DIM * 16
    assert flops.training_flops(model, 32) == flops.training_flops(plain, 32) + 3 * 2 * once
    assert model.multi_token is not None
    assert flops.forward_flops(model.multi_token, 32) == 2 * (once - 2 * VOCABULARY * DIM)


def test_weights_have_roles_and_follow_from_their_names() -> None:
    model = resolve(TransformerConfig, spec()).build().initialise(5)
    roles = parameter_roles(model)
    assert roles["multi_token.layers.1.project.weight"] == "replicate"
    assert roles["multi_token.layers.2.layer.mixer.qkv.weight"] == "column"
    assert {roles[f"multi_token.layers.1.{name}.weight"] for name in ("embedding_norm", "hidden_norm", "norm")} == {
        "norm"
    }
    weights = dict(model.named_parameters())
    expected = torch.empty(DIM, 2 * DIM)
    # Of a plain matrix: an output of the size of an embedding, to which a layer adds.
    fill_normal(expected, 0.02, seed=5, name="multi_token.layers.2.project.weight")
    assert torch.equal(weights["multi_token.layers.2.project.weight"], expected)
    assert weights["multi_token.layers.1.norm.weight"].eq(1).all()


def test_each_module_has_the_last_layers_kind_or_its_own() -> None:
    last = {**LAYER, "mixer": {"kind": "attention", "heads": 2}}
    like_last = resolve(TransformerConfig, spec(layers=[LAYER, last])).build()
    assert [module.layer.mixer.heads for module in like_last.multi_token.layers.values()] == [2, 2]
    part = {"kind": "sequential", "layer": {**LAYER, "kind": "sandwich"}, "norm": "layer"}
    own = resolve(TransformerConfig, spec(multi_token=part)).build()
    (module,) = own.multi_token.layers.values()
    assert type(module.layer).__name__ == "Sandwich"
    assert {type(norm).__name__ for norm in (module.embedding_norm, module.hidden_norm, module.norm)} == {"LayerNorm"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_whole(tmp_path: Path, tied: bool) -> None:
    model = build_meta(resolve(TransformerConfig, spec(tied=tied))).to_empty(device="cpu").initialise(0)
    loaded = load_model(save_model(model, tmp_path))
    assert loaded.config == model.config
    tokens, context = draw(), AttentionContext.packed(DOCUMENTS)
    assert model.head.weight.shape == (VOCABULARY, DIM)
    for found, expected in zip(further(loaded, tokens, context), further(model, tokens, context), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, r"model.multi_token.depth: expected int > 0, got 0"),
        ({"depth": 32}, r"model.multi_token.depth: 32 is further than a sequence of max_length=32 reaches"),
        ({"weight": -0.1}, r"model.multi_token.weight: expected float > 0, got -0.1"),
        ({"kind": "sequental"}, r"model.multi_token.*'sequental'.*'sequential'"),
        ({"layer": {**LAYER, "repeat": 2}}, r"model.multi_token.layer.*stands for 2 layers"),
        ({"layer": {"kind": "cycle", "layers": [LAYER, LAYER]}}, r"model.multi_token.layer.*stands for 2 layers"),
        (
            {"layer": {**LAYER, "mixer": {"kind": "attention", "heads": 5}}},
            r"model.multi_token.layer.mixer.heads.*5 does not divide the model's dim=16",
        ),
    ],
)
def test_impossible_parts_are_explained(change: dict[str, Any], message: str) -> None:
    class Whole(Config):
        model: TransformerConfig

    with pytest.raises(ConfigError, match=message):
        resolve(Whole, {"model": spec(multi_token={"kind": "sequential", **change})})


def test_a_row_shorter_than_the_depth_is_refused() -> None:
    model = make(depth=3)
    with pytest.raises(ValueError, match=r"multi_token.depth: 3 needs rows of more than that many tokens, not of 3"):
        further(model, draw()[:, :3], AttentionContext.causal(2, 3))


def test_compute_dtype_follows_the_model() -> None:
    model = resolve(TransformerConfig, spec()).build().initialise(0)
    model.dtype = torch.bfloat16
    for hidden in further(model, draw(), AttentionContext.packed(DOCUMENTS)):
        assert hidden.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_users_own_kind_needs_one_file(tmp_path: Path) -> None:
    (tmp_path / "heads.py").write_text(OWN_KIND)
    source = spec(multi_token={"kind": "projected", "depth": 2})
    model: Any = resolve(TransformerConfig, {**source, "imports": [str(tmp_path / "heads.py")]}).build()
    assert isinstance(model.multi_token, nn.Module)
    assert [h.shape for h in further(model.initialise(0), draw(), AttentionContext.packed(DOCUMENTS))] == [
        (2, 10, DIM)
    ] * 2


OWN_KIND = """
from typing import Literal
from torch import nn
from treadle.nn.config import MultiTokenConfig
from treadle.nn.linear import Linear

class ProjectedConfig(MultiTokenConfig):
    kind: Literal["projected"] = "projected"

class Projected(nn.Module):
    roles = {"layers": "column"}

    def __init__(self, config, dim, max_length, last):
        super().__init__()
        self.layers = nn.ModuleDict({str(k): Linear(dim, dim) for k in range(config.depth)})

    def forward(self, x_BSD, tokens_BS, context, embed):
        return [layer(x_BSD) for layer in self.layers.values()]
"""
