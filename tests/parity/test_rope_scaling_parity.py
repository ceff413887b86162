"""Every RoPE scaling against transformers: frequencies, magnitudes, tables at several lengths, layouts and shares."""

from typing import Any

import pytest
import torch
from torch import Tensor

from treadle.attention import AttentionContext
from treadle.nn.position import Rope, RopeConfig

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

HEAD, ORIGINAL, LONGEST = 64, 128, 1024
FACTORS = {"short_factor": [1 + 0.01 * j for j in range(32)], "long_factor": [1 + 0.5 * j for j in range(32)]}
YARN = {"kind": "yarn", "original_length": ORIGINAL}

CASES: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "dynamic_ntk": {"kind": "dynamic_ntk", "factor": 4.0, "original_length": ORIGINAL},
    "llama3": {"kind": "llama3", "factor": 8.0, "original_length": ORIGINAL},
    "llama3_bounds": {"kind": "llama3", "low_freq_factor": 2.0, "high_freq_factor": 9.0, "original_length": 64},
    "yarn": {**YARN, "factor": 8.0},
    "yarn_inferred": {**YARN, "factor": None},
    "yarn_untruncated": {**YARN, "factor": 8.0, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn_deepseek": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn_attention": {**YARN, "factor": 8.0, "attention_factor": 1.25},
    "longrope": {"kind": "longrope", "original_length": ORIGINAL, **FACTORS},
    "longrope_factor": {"kind": "longrope", "original_length": ORIGINAL, **FACTORS, "factor": 3.0},
    "longrope_attention": {"kind": "longrope", "original_length": ORIGINAL, **FACTORS, "attention_factor": 1.5},
}


def peer_config(scaling: dict[str, Any], partial: float = 1.0) -> Any:
    """Ours in transformers' words. Its dynamic NTK takes the model's longest length for the original one."""
    parameters = {key: value for key, value in scaling.items() if key not in ("kind", "original_length")}
    names = {"dynamic_ntk": "dynamic"}
    parameters |= {"rope_type": names.get(scaling["kind"], scaling["kind"]), "rope_theta": 5000.0}
    parameters["partial_rotary_factor"] = partial
    longest = LONGEST
    if scaling["kind"] == "dynamic_ntk":
        longest = scaling["original_length"]
    elif "original_length" in scaling:
        parameters["original_max_position_embeddings"] = scaling["original_length"]
    if scaling["kind"] == "llama3":
        parameters = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | parameters
    if scaling["kind"] == "longrope":
        parameters.setdefault("factor", LONGEST / scaling["original_length"])
    return transformers.LlamaConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=longest, rope_parameters=parameters
    )


def build(scaling: dict[str, Any] | None, **changes: Any) -> Rope:
    config = RopeConfig.model_validate({"theta": 5000.0, "scaling": scaling, **changes})
    assert not list(config.problems(HEAD))
    rope: Rope = config.build(HEAD, LONGEST)
    return rope


@pytest.mark.parametrize("length", [1, 100, ORIGINAL, ORIGINAL + 1, 500, 3000])
@pytest.mark.parametrize("name", CASES)
def test_tables_equal_transformers(name: str, length: int) -> None:
    rope, peer = build(CASES[name]), LlamaRotaryEmbedding(peer_config(CASES[name]))
    positions_BS = torch.arange(length)[None]
    cos_BSK, sin_BSK = (table[:, :, 0] for table in rope.tables(AttentionContext.causal(1, length)))
    expected = peer(torch.zeros(1), positions_BS)
    for got, table in zip((cos_BSK, sin_BSK), expected, strict=True):
        # Theirs has float32 angles: off by 2^-24 of the angle, more after its few roundings.
        assert (got - table).abs().max() < 1e-6 + 4e-7 * length


@pytest.mark.parametrize("partial", [1.0, 0.25, 0.5])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("longrope")])
def test_frequencies_and_magnitude_of_a_share(name: str, partial: float) -> None:
    scaling = CASES[name]
    config = peer_config(scaling, partial)
    expected_J, magnitude = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None, seq_len=700)
    rope = build(scaling, partial=partial)
    got_J = rope.scaling.frequencies(AttentionContext.causal(1, 700)).flatten()
    torch.testing.assert_close(got_J, expected_J.double(), rtol=2e-6, atol=0)
    assert rope.scaling.magnitude == pytest.approx(magnitude, rel=1e-12)


def test_interleaved_and_partial_equal_gptj() -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    rope = RopeConfig(layout="interleaved", partial=0.25).build(HEAD, 64)
    q, k = torch.randn(2, 50, 3, HEAD), torch.randn(2, 50, 1, HEAD)
    sin, cos = create_sinusoidal_positions(50, 16).expand(2, -1, -1).chunk(2, dim=-1)
    for got, x in zip(rope(q, k, AttentionContext.causal(2, 50)), (q, k), strict=True):
        expected = torch.cat((apply_rotary_pos_emb(x[..., :16], sin, cos), x[..., 16:]), dim=-1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def tables(rope: Rope, context: AttentionContext) -> Tensor:
    return torch.cat(rope.tables(context), dim=-1)


@pytest.mark.parametrize("name", ["dynamic_ntk", "longrope"])
def test_a_documents_length_is_its_own(name: str) -> None:
    rope, lengths = build(CASES[name]), [30, 200, 1, 128, 129, 400]
    numbers_BS = torch.repeat_interleave(torch.arange(6) * 3, torch.tensor(lengths)).view(2, -1)
    packed = tables(rope, AttentionContext.packed(numbers_BS)).flatten(0, 1)
    start = 0
    for length in [30, 200, 1, 128, 85, 44, 400]:  # the row ends within the fifth
        alone = tables(rope, AttentionContext.causal(1, length))[0]
        assert torch.equal(packed[start : start + length], alone)
        start += length
    rows = AttentionContext(torch.stack((torch.arange(100, 150), torch.arange(50))))
    assert torch.equal(tables(rope, rows)[0], tables(rope, AttentionContext.causal(1, 150))[0, 100:])
    assert torch.equal(tables(rope, rows)[1], tables(rope, AttentionContext.causal(1, 50))[0])


@pytest.mark.parametrize("name", CASES)
def test_tables_compile_as_one_graph(name: str) -> None:
    rope = build(CASES[name])
    packed = AttentionContext.packed(torch.tensor([[0] * 150 + [1] * 20]))

    def compute(positions_BS: Tensor, documents_BS: Tensor) -> Tensor:
        return tables(rope, AttentionContext(positions_BS, documents_BS))

    assert packed.documents_BS is not None
    compiled = torch.compile(compute, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(packed.positions_BS, packed.documents_BS), tables(rope, packed))
