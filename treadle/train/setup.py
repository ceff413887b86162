"""From configuration to a state that is ready to step: what every recipe does first."""

import torch

from treadle.errors import ConfigError
from treadle.nn.store import build_meta
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.parallel.activation_checkpointing import apply_activation_checkpointing
from treadle.parallel.compile import compile_layers
from treadle.train.config import Precision, TrainingConfig
from treadle.train.optimizers import OptimizerConfig
from treadle.train.state import TrainState

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def find_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises ConfigError for cuda without a GPU, and for no device at all."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: '{name}', but PyTorch sees no GPU here; use device=cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: '{name}'; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and generators mean the current device
    return device


def with_vocabulary(model: TransformerConfig, size: int) -> TransformerConfig:
    """The config with room for a tokenizer's `size` ids. Raises ConfigError when the model has too few."""
    if model.vocab_size is None:
        return model.model_copy(update={"vocab_size": -(-size // 64) * 64})
    if model.vocab_size < size:
        raise ConfigError(
            f"model.vocab_size: {model.vocab_size} is less than the tokenizer's {size} tokens; raise it to at least "
            f"{size}, or leave it out to take it from the tokenizer"
        )
    return model


def build_model(config: TransformerConfig, training: TrainingConfig, *, seed: int, device: torch.device) -> Transformer:
    """Master weights in fp32 on `device`, initialised; layers recompute and compile as `training` says."""
    model = build_meta(config).to_empty(device=device).initialise(seed)
    model.dtype = DTYPES[training.precision]
    for layers in (model.layers,) if model.multi_token is None else (model.layers, model.multi_token.layers):
        apply_activation_checkpointing(layers, training.activation_checkpointing)
        if training.compile:
            compile_layers(layers)
    return model


def build_state(model: Transformer, optimizer: OptimizerConfig, training: TrainingConfig) -> TrainState:
    """The model with its optimizers, before the first step."""
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "fp16")
    return TrainState(model, optimizer.build(model), scaler)
