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
    """config: the class, less `Config`. model: the class; empty: `config`ForCausalLM. lengths: of rows to compare."""

    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    lengths: tuple[int, ...] = (1, 17, 60)
    tolerance: float = 1e-5


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
