"""config.json files as published, in the words of their time: sizes that are known, and transformers' reading.

Lists of LongRoPE factors are made up, their number is not.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle.errors import CheckpointError, ConfigError
from treadle.families.checkpoint import load, read_spec
from treadle.families.family import find, unrolled
from treadle.nn.store import build_meta

transformers = pytest.importorskip("transformers")

SHORT, LONG = [1.0 + 0.02 * i for i in range(48)], [1.0 + 0.5 * i for i in range(48)]
QWEN = {"attention_dropout": 0.0, "hidden_act": "silu", "use_sliding_window": False, "rms_norm_eps": 1e-06}

# name: (class, parameters, config.json)
PUBLISHED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Mistral-7B-v0.1": (
        "Mistral",
        7_241_732_096,
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
    ),
    "Mixtral-8x7B-v0.1": (
        "Mixtral",
        46_702_792_704,
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "Qwen2.5-7B": (
        "Qwen2",
        7_615_616_512,
        {
            **QWEN,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_mrope": False,
            "vocab_size": 152064,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        "Qwen2Moe",
        14_315_784_192,
        {
            **QWEN,
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "model_type": "qwen2_moe",
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        "Qwen3",
        596_049_920,
        {
            **QWEN,
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        30_532_122_624,
        {
            **QWEN,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
    ),
    "gemma-2-9b": (
        "Gemma2",
        9_241_705_984,
        {
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "model_type": "gemma2",
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "vocab_size": 256000,
        },
    ),
    "gemma-3-1b-pt": (
        "Gemma3Text",
        999_885_952,
        {
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
    ),
    "Phi-3-mini-128k-instruct": (
        "Phi3",
        3_821_079_552,
        {
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "model_type": "phi3",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
    ),
    "Phi-4-mini-instruct": (
        "Phi3",
        3_836_021_760,
        {
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "model_type": "phi3",
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
    ),
    "SmolLM3-3B": (
        "SmolLM3",
        3_075_098_624,
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
    ),
    "granite-3.0-2b-base": (
        "Granite",
        2_533_531_648,
        {
            "attention_bias": False,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "logits_scaling": 8.0,
            "max_position_embeddings": 4096,
            "mlp_bias": False,
            "model_type": "granite",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000,
            "tie_word_embeddings": True,
            "vocab_size": 49155,
        },
    ),
    "OLMo-1B-hf": (
        "Olmo",
        1_176_764_416,
        {
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 2048,
            "model_type": "olmo",
            "num_attention_heads": 16,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "vocab_size": 50304,
        },
    ),
    "OLMo-2-1124-7B": (
        "Olmo2",
        7_298_617_344,
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "model_type": "olmo2",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "vocab_size": 100352,
        },
    ),
    "OLMoE-1B-7B-0924": (
        "Olmoe",
        6_919_161_856,
        {
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "model_type": "olmoe",
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
    ),
    "stablelm-2-1_6b": (
        "StableLm",
        1_644_515_328,
        {
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 4096,
            "model_type": "stablelm",
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "use_qkv_bias": True,
            "vocab_size": 100352,
        },
    ),
}
TINY = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TINY |= {"intermediate_size": 48, "max_position_embeddings": 64, "num_hidden_layers": 2}


def resaved(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json, and would write."""
    said: dict[str, Any] = json.loads(
        getattr(transformers, f"{name}Config").from_dict(deepcopy(config)).to_json_string()
    )
    return said


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_model_of_known_size(name: str) -> None:
    _, parameters, config = PUBLISHED[name]
    model = build_meta(find(config).spec(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_old_words_and_new_words_say_the_same(name: str) -> None:
    kind, _, config = PUBLISHED[name]
    family = find(config)
    spec = family.spec(config)
    assert unrolled(family.spec(resaved(kind, config))) == unrolled(spec)
    written = family.config(spec)
    assert unrolled(family.spec(resaved(kind, written))) == unrolled(spec), "what is written says the same to both"


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": (
        "Qwen2.5-7B",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    ),
    "windows-above": ("Qwen2.5-7B", {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 4096}),
    "windows-below": ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True}),
    "sparse-step": ("Qwen3-30B-A3B", {"decoder_sparse_step": 3, "mlp_only_layers": [2, 5]}),
    "scaled-global-layers": ("gemma-3-1b-pt", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "nope-interval": ("SmolLM3-3B", {"no_rope_layers": None, "no_rope_layer_interval": 3, "layer_types": None}),
    "parallel": ("stablelm-2-1_6b", {"use_parallel_residual": True, "qk_layernorm": True}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_old_words_that_few_use(name: str) -> None:
    base, changes = CHANGES[name]
    kind, _, config = PUBLISHED[base]
    family = find(config)
    plain, spec = family.spec(config), family.spec({**config, **changes})
    assert unrolled(spec) != unrolled(plain), "the change is seen"
    assert unrolled(family.spec(resaved(kind, {**config, **changes}))) == unrolled(spec)
    assert unrolled(family.spec(resaved(kind, family.config(spec)))) == unrolled(spec)


def test_su_is_longrope() -> None:
    """As Phi 3's first files call it, which transformers 5 does not read any more."""
    config = PUBLISHED["Phi-3-mini-128k-instruct"][2]
    renamed = {**config, "rope_scaling": {**config["rope_scaling"], "type": "su"}}
    assert find(config).spec(renamed) == find(config).spec(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_optional_keys_the_defaults_are_those_of_transformers(name: str) -> None:
    kind, _, published = PUBLISHED[name]
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "layer_types")
    needed += ("intermediate_size", "max_position_embeddings", "num_experts", "num_local_experts", "no_rope_layers")
    needed += ("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    config = {key: value for key, value in published.items() if key in needed}
    fitting = {"Qwen2": 32, "Qwen3": 32, "Gemma3Text": 8}  # heads, by the default number of key-value heads
    config["num_attention_heads"] = fitting.get(kind, published["num_attention_heads"])
    config["hidden_size"] = 128 * config["num_attention_heads"]
    family = find(config)
    assert unrolled(family.spec(config)) == unrolled(family.spec(resaved(kind, config)))


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("OLMoE-1B-7B-0924", {"clip_qkv": 8.0}, "clip_qkv: 8.0 is not supported"),
        ("gemma-2-9b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-3-1b-pt", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Qwen2.5-7B", {"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config"),
        ("Qwen2.5-7B", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 28 layers"),
        ("Mistral-7B-v0.1", {"hidden_act": "silo"}, "unknown activation 'silo'"),
        ("Mixtral-8x7B-v0.1", {"partial_rotary_factor": 0.5}, "rotates whole heads only"),
    ],
)
def test_what_cannot_be_computed_is_refused(base: str, changes: dict[str, Any], message: str) -> None:
    config = {**PUBLISHED[base][2], **changes}
    with pytest.raises(ConfigError, match=message):
        find(config).spec(config)


def test_a_family_refuses_what_it_has_no_word_for() -> None:
    def written(family: str, name: str) -> None:
        config = PUBLISHED[name][2]
        find({"model_type": family}).config(find(config).spec(config))

    with pytest.raises(ConfigError, match="embedding_scale"):
        written("gemma2", "Mistral-7B-v0.1")
    with pytest.raises(ConfigError, match="residual_scale"):
        written("llama", "granite-3.0-2b-base")
    with pytest.raises(ConfigError, match="position"):
        written("llama", "SmolLM3-3B")
    with pytest.raises(ConfigError, match="qk_norm"):
        written("granite", "Qwen3-0.6B")


def test_a_model_of_images_is_refused_and_its_language_model_is_read(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 127, "boi_token_index": 126, "eoi_token_index": 125, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=dict(TINY), vision_config=vision, **tokens)
    whole = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"'gemma3' reads more than text.*language_model"):
        read_spec(tmp_path / "whole")

    whole.model.language_model.save_pretrained(tmp_path / "text")
    tokens_BS = torch.randint(0, 120, (2, 20))
    with torch.no_grad():
        expected = whole(tokens_BS, token_type_ids=torch.zeros_like(tokens_BS), use_cache=False).logits
        error = (load(tmp_path / "text")(tokens_BS) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{error:.2e}"
