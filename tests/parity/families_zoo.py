"""Tiny members of every family, as arguments of transformers' config classes."""

from dataclasses import dataclass, field
from typing import Any

SIZES = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def rope(name: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": name, "rope_theta": 5000.0, **parameters}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


@dataclass(frozen=True)
class Case:
    """config: the class, less `Config`. model: the class; empty: config + ForCausalLM. lengths: of the rows compared.
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
