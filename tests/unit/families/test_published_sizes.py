"""config.json files as they were published, many before transformers 5: what they describe has the published size."""

from typing import Any

import pytest

from treadle.errors import ConfigError
from treadle.families.family import find, unrolled
from treadle.nn.store import build_meta
from treadle.nn.transformer import TransformerConfig

GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
PYTHIA_1B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 16,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
FALCON_7B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": 65024,
}
FALCON_40B = {
    **FALCON_7B,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
NEW_WORDS = {"multi_query", "new_decoder_architecture", "num_attention_heads", "num_hidden_layers", "num_kv_heads"}
FALCON_40B_AT_FIRST = {key: value for key, value in FALCON_40B.items() if key not in NEW_WORDS}
FALCON_40B_AT_FIRST |= {"model_type": "RefinedWeb", "n_head": 128, "n_head_kv": 8, "n_layer": 60}
FALCON_RW_1B = {
    **FALCON_7B,
    "alibi": True,
    "bias": True,
    "hidden_size": 2048,
    "multi_query": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "transformers_version": "4.20.0",
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}
MPT_7B = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"init_div_is_residual": True, "name": "kaiming_normal_", "verbose": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
OPT_1B3 = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 8192,
    "hidden_size": 2048,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 2048,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V3 = {
    **DEEPSEEK_V2_LITE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": {**DEEPSEEK_V2_LITE["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0},  # type: ignore[dict-item]
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}

SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (GPT2, 124_439_808),
    "pythia-1b": (PYTHIA_1B, 1_011_781_632),
    "falcon-7b": (FALCON_7B, 6_921_720_704),
    "falcon-40b": (FALCON_40B, 41_303_293_952),
    "falcon-40b at first": (FALCON_40B_AT_FIRST, 41_303_293_952),
    "falcon-rw-1b": (FALCON_RW_1B, 1_311_625_216),
    "bloom-560m": (BLOOM_560M, 559_214_592),
    "mpt-7b": (MPT_7B, 6_649_286_656),
    "opt-1.3b": (OPT_1B3, 1_315_758_080),
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15_706_484_224),
    "DeepSeek-V3": (DEEPSEEK_V3, 671_026_419_200),
}


def spec(config: dict[str, Any], **changes: Any) -> TransformerConfig:
    config = {**config, **changes}
    return find(config).spec(config)


@pytest.mark.parametrize("name", SIZES)
def test_published_config_has_the_published_number_of_parameters(name: str) -> None:
    config, parameters = SIZES[name]
    assert sum(parameter.numel() for parameter in build_meta(spec(config)).parameters()) == parameters


@pytest.mark.parametrize("name", SIZES)
def test_what_is_written_for_it_is_read_as_the_same(name: str) -> None:
    config, _ = SIZES[name]
    ours = spec(config)
    written = find(config).config(ours)
    assert unrolled(find(written).spec(written)) == unrolled(ours)


def test_stacks_are_written_shortly() -> None:
    assert [entry.repeat for entry in spec(DEEPSEEK_V3).layers] == [3, 58]
    (cycle,) = spec(GPT_OSS_20B).layers
    assert cycle.repeat == 12
    assert [entry.mixer.window for entry in cycle.layers] == [128, None]  # type: ignore[attr-defined]


def test_names_of_old() -> None:
    pythia = spec(PYTHIA_1B, rotary_emb_base=5000, rotary_pct=0.5, hidden_act="gelu_fast").expand()[0]
    assert (pythia.mixer.position.theta, pythia.mixer.position.partial) == (5000, 0.5)  # type: ignore[attr-defined]
    assert pythia.feedforward.activation == "gelu_tanh"  # type: ignore[attr-defined]
    assert spec(BLOOM_560M, seq_length=512).max_length == 512


def test_gpt_oss_without_rope_parameters_is_scaled_all_the_same() -> None:
    """As transformers' class has it: YaRN by 32."""
    bare = {key: value for key, value in GPT_OSS_20B.items() if key != "rope_scaling"}
    assert unrolled(spec(bare)) == unrolled(spec(GPT_OSS_20B))


def test_logits_scale_of_mpt() -> None:
    """Which transformers leaves out: the authors' code multiplies the logits by it."""
    assert spec(MPT_7B, logit_scale=0.5).logits_scale == 0.5
    assert spec(MPT_7B, logit_scale="inv_sqrt_d_model").logits_scale == 1 / 64
    assert find(MPT_7B).config(spec(MPT_7B, logit_scale=0.5))["logit_scale"] == 0.5


@pytest.mark.parametrize(
    ("config", "changes", "told"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights: False is not supported"),
        (GPT2, {"n_layer": None}, "lacks the number of layers, 'n_layer'"),
        (FALCON_40B, {"parallel_attn": False}, "parallel_attn: the new decoder architecture is always parallel"),
        (BLOOM_560M, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        (MPT_7B, {"attn_config": {"alibi": False}}, "alibi: False is not supported"),
        (MPT_7B, {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln: True is not understood"),
        (MPT_7B, {"attn_config": {"clip_qvk": 6.0}}, "attn_config.clip_qvk: 6.0 is not understood. Did you mean"),
        (OPT_1B3, {"word_embed_proj_dim": 512}, "word_embed_proj_dim: 512 is not hidden_size=2048"),
        (OPT_1B3, {"do_layer_norm_before": False}, "do_layer_norm_before: False is not supported"),
        (GPT_OSS_20B, {"swiglu_limit": 10.0}, "swiglu_limit: 10.0 is not supported"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob: True is not supported"),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, "topk_method: 'noaux_tc'; known: greedy"),
        (DEEPSEEK_V2_LITE, {"num_key_value_heads": 4}, "num_key_value_heads: 4 is not num_attention_heads=16"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(config: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        spec(config, **changes)


@pytest.mark.parametrize(
    ("config", "change", "told"),
    [
        (GPT2, {"position": None}, "position"),
        (BLOOM_560M, {"max_length": 4096, "embedding_norm": None}, "embedding_norm"),
        (PYTHIA_1B, {"embedding_scale": 2.0}, "embedding_scale"),
    ],
)
def test_a_model_that_a_family_has_no_word_for_is_not_written(
    config: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=f"this model is no '{config['model_type']}'(.|\n)*{told}"):
        find(config).config(spec(config).model_copy(update=change))


def test_falcon_has_no_sequential_layers_with_grouped_queries() -> None:
    layer = spec(FALCON_RW_1B).expand()[0]
    grouped = layer.model_copy(update={"mixer": layer.mixer.model_copy(update={"kv_heads": 4})})  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="grouped queries go with a parallel layer only"):
        find(FALCON_7B).config(spec(FALCON_RW_1B).model_copy(update={"layers": [grouped]}))


def test_deepseeks_shared_experts_are_as_wide_as_some_experts() -> None:
    layer = spec(DEEPSEEK_V2_LITE).expand()[-1]
    moe = layer.feedforward  # type: ignore[attr-defined]
    narrow = moe.model_copy(update={"shared": moe.shared.model_copy(update={"dim": 1000})})
    model = spec(DEEPSEEK_V2_LITE).model_copy(update={"layers": [layer.model_copy(update={"feedforward": narrow})]})
    with pytest.raises(ConfigError, match="shared dim=1000 is no multiple of the experts' dim=1408"):
        find(DEEPSEEK_V2_LITE).config(model)


def test_deepseeks_experts_have_a_shared_one() -> None:
    with pytest.raises(ConfigError, match="its experts have no shared one beside them"):
        find(DEEPSEEK_V3).config(spec(DEEPSEEK_V3, n_shared_experts=None))
