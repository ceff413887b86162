"""Tiny members of every family, as arguments of transformers' config classes."""

from dataclasses import dataclass, field
from typing import Any

SIZES = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def rope(name: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": name, "rope_theta": 5000.0, **parameters}


ORIGINAL = {"original_max_position_embeddings": 32}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)


@dataclass(frozen=True)
class Case:
    """config: the class, less `Config`. model: the class; empty: `config`ForCausalLM. lengths: of rows to compare.
    attention: the implementation of transformers that is compared with."""

    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    lengths: tuple[int, ...] = (1, 17, 60)
    tolerance: float = 1e-5
    attention: str = "eager"


CASES: dict[str, Case] = {
    "llama": Case("Llama", GROUPED),
    "llama-bias-tied": Case(
        "Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True}
    ),
    "llama-3.1": Case("Llama", {**GROUPED, "rope_parameters": LLAMA3}, lengths=(20, 60, 150)),
    "llama-linear": Case("Llama", {**GROUPED, "rope_parameters": rope("linear", factor=4.0)}),
    "llama-yarn": Case(
        "Llama",
        {**GROUPED, "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16)},
        lengths=(10, 40, 100),
    ),
    "llama-dynamic": Case("Llama", {**GROUPED, "rope_parameters": rope("dynamic", factor=2.0)}, lengths=(20, 64, 100)),
}


FOUR = {**GROUPED, "num_hidden_layers": 4}  # with a window of 8, shorter than two of the rows
LOCAL = {**FOUR, "use_sliding_window": True, "sliding_window": 8}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
# Four frequencies of the eight channels that a head has here; beyond 32 tokens the long ones.
LONG = rope("longrope", short_factor=[1.0, 1.1, 1.5, 2.0], long_factor=[1.5, 3.0, 9.0, 30.0])
LONG |= {"original_max_position_embeddings": 32}
PHI = {**GROUPED, "pad_token_id": None, "original_max_position_embeddings": 32}

CASES |= {
    "mistral": Case("Mistral", {**GROUPED, "sliding_window": 8, "head_dim": 16}),
    "mistral-full-tied": Case("Mistral", {**GROUPED, "sliding_window": None, "tie_word_embeddings": True}),
    "mixtral": Case("Mixtral", {**GROUPED, "num_local_experts": 4}),
    "mixtral-window": Case(
        "Mixtral", {**GROUPED, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 8}
    ),
    "qwen2": Case("Qwen2", GROUPED),
    "qwen2-window-tied": Case("Qwen2", {**LOCAL, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-yarn": Case(
        "Qwen2",
        {**GROUPED, "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16)},
        lengths=(10, 40, 100),
    ),
    "qwen3": Case("Qwen3", {**GROUPED, "head_dim": 16}),
    "qwen3-window-bias-tied": Case(
        "Qwen3",
        {**LOCAL, "head_dim": 8, "max_window_layers": 3, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen2-moe": Case("Qwen2Moe", {**GROUPED, **SHARED}),
    "qwen2-moe-dense-layers": Case("Qwen2Moe", {**FOUR, **SHARED, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen2-moe-step-window": Case(
        "Qwen2Moe", {**LOCAL, **SHARED, "decoder_sparse_step": 2, "qkv_bias": False, "max_window_layers": 3}
    ),
    "qwen3-moe": Case("Qwen3Moe", {**GROUPED, **EXPERTS, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3-moe-dense-layers-window": Case(
        "Qwen3Moe", {**LOCAL, **EXPERTS, "head_dim": 16, "mlp_only_layers": [0, 1], "attention_bias": True}
    ),
    "gemma2": Case(
        "Gemma2", {**FOUR, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 12, "attention_bias": True}
    ),
    "gemma2-caps": Case(
        "Gemma2",
        {
            **FOUR,
            "head_dim": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": Case(
        "Gemma3Text", {**FOUR, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3}, "Gemma3ForCausalLM"
    ),
    "gemma3-linear": Case(
        "Gemma3Text",
        {
            **FOUR,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": rope("linear", factor=8.0),
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        "Gemma3ForCausalLM",
    ),
    "phi3": Case("Phi3", {**GROUPED, "pad_token_id": None, "sliding_window": 8}),
    "phi3-longrope": Case("Phi3", {**PHI, "rope_parameters": LONG}, lengths=(1, 32, 33, 60)),
    "phi4-mini": Case(
        "Phi3",
        {
            **PHI,
            "num_attention_heads": 2,
            "rope_parameters": {**LONG, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
        lengths=(1, 32, 33, 60),
    ),
    "smollm3": Case("SmolLM3", {**FOUR, "pad_token_id": None}),
    "smollm3-window-bias": Case(
        "SmolLM3",
        {
            **LOCAL,
            "pad_token_id": None,
            "no_rope_layers": [0, 1, 1, 0],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "granite": Case(
        "Granite",
        {
            **GROUPED,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 13.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite-bias": Case("Granite", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "olmo": Case("Olmo", GROUPED),
    "olmo-clip-bias-tied": Case(
        "Olmo", {**GROUPED, "clip_qkv": 0.5, "attention_bias": True, "tie_word_embeddings": True}
    ),
    "olmo2": Case("Olmo2", GROUPED),
    "olmo2-bias-tied": Case("Olmo2", {**GROUPED, "attention_bias": True, "tie_word_embeddings": True}),
    "olmoe": Case("Olmoe", {**GROUPED, "num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-normalised": Case(
        "Olmoe",
        {**GROUPED, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "attention_bias": True},
    ),
    "stablelm": Case("StableLm", {**GROUPED, "use_qkv_bias": True}),
    "stablelm-12b": Case(
        "StableLm",
        {
            **GROUPED,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "rope_parameters": {**rope("default"), "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
}

# Families that are no variations of Llama.
OLD = {"vocab_size": 131, "n_head": 4, "n_layer": 2}
NEOX = {**SIZES, "intermediate_size": 48}
# transformers rounds Falcon's slopes and biases to bf16: exact for powers of two up to position 256. Its eager
# attention adds the bias twice, by itself and within the mask; sdpa, its default, once, as the authors' code.
RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
OSS = {**GROUPED, "num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
OSS |= {"sliding_window": 8}
SHORT_YARN = rope(
    "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0, truncate=False
)

CASES |= {
    "gpt2": Case("GPT2", {**OLD, "n_embd": 32, "n_positions": 64}, model="GPT2LMHeadModel"),
    "gpt2-wide-untied": Case(
        "GPT2",
        {**OLD, "n_embd": 32, "n_positions": 64, "n_inner": 48, "tie_word_embeddings": False}
        | {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
        model="GPT2LMHeadModel",
    ),
    "gpt-neox": Case("GPTNeoX", NEOX),
    "gpt-neox-sequential": Case(
        "GPTNeoX",
        {**NEOX, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "relu"}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    ),
    "falcon-7b": Case("Falcon", SIZES),
    "falcon-40b": Case("Falcon", {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-11b": Case(
        "Falcon",
        {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}
        | {"ffn_hidden_size": 48, "tie_word_embeddings": False},
    ),
    "falcon-rw": Case("Falcon", {**SIZES, **RW}, lengths=(1, 17, 200), attention="sdpa"),
    "bloom": Case("Bloom", {**OLD, "hidden_size": 32}, lengths=(1, 17, 200)),
    "bloom-6-heads": Case("Bloom", {**OLD, "hidden_size": 48, "n_head": 6, "layer_norm_epsilon": 1e-3}),
    "mpt": Case("Mpt", {"vocab_size": 131, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "mpt-clip-6-heads": Case(
        "Mpt",
        {"vocab_size": 131, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 256}
        | {"attn_config": {"clip_qkv": 0.3, "softmax_scale": 0.2}},
        lengths=(1, 17, 200),
    ),
    "gpt-oss": Case("GptOss", {**OSS, "rope_parameters": SHORT_YARN}, lengths=(1, 7, 16, 60, 100)),
    "gpt-oss-default-yarn": Case("GptOss", {**OSS, "attention_bias": False}),
    "opt": Case("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-bare": Case(
        "OPT",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "enable_bias": False}
        | {"layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
}

LATENT = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 4, "intermediate_size": 48}
LATENT |= {"q_lora_rank": 16, "kv_lora_rank": 24, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
LATENT |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
V3 = {**LATENT, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0}
MSCALE = rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9)

CASES |= {
    "deepseek-v2": Case("DeepseekV2", {**LATENT, "attention_bias": True, "n_shared_experts": 1}),
    "deepseek-v2-groups-yarn": Case(
        "DeepseekV2",
        {**LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "rope_parameters": MSCALE}
        | {"routed_scaling_factor": 3.0, "tie_word_embeddings": True},
        lengths=(1, 10, 60, 100),
    ),
    "deepseek-v2-lite": Case("DeepseekV2", {**LATENT, "q_lora_rank": None, "first_k_dense_replace": 0}),
    "deepseek-v3": Case("DeepseekV3", V3),
    "deepseek-v3-yarn": Case(
        "DeepseekV3",
        {**V3, "rope_parameters": MSCALE, "attention_bias": True, "n_shared_experts": 2, "norm_topk_prob": False},
        lengths=(1, 10, 60, 100),
    ),
    "deepseek-v3-half-direct": Case(
        "DeepseekV3", {**V3, "rope_interleave": False, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
    ),
}
