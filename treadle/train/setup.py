"""From configuration to a state that is ready to step: what every recipe does first."""

import torch

from treadle.errors import ConfigError
from treadle.finetune import FinetuneConfig, attach
from treadle.nn.store import build_meta
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.parallel.activation_checkpointing import BudgetConfig, apply_activation_checkpointing, offloads
from treadle.parallel.activation_offload import offload_activations
from treadle.parallel.compile import compile_between, compile_layers
from treadle.parallel.config import ZERO_BUBBLE, ParallelConfig, context_problems
from treadle.parallel.data import shard_data
from treadle.parallel.expert import distribute_experts
from treadle.parallel.float8 import use_float8
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import cut
from treadle.parallel.shards import parts_of, pieces
from treadle.parallel.tensor import shard_tensor
from treadle.train.config import Precision, TrainingConfig
from treadle.train.optimizers import OptimizerConfig
from treadle.train.state import TrainState

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def build_model(
    config: TransformerConfig,
    training: TrainingConfig,
    *,
    seed: int,
    mesh: Mesh | None = None,
    parallel: ParallelConfig | None = None,
    finetune: FinetuneConfig | None = None,
) -> Transformer:
    """This process's part of the model, its master weights in fp32 and initialised.

    The one way from a configuration to a model that trains: built without memory, cut, wrapped, sharded, and only then
    given memory and values, so that no process ever holds more than its part.
    """
    mesh, parallel = mesh or Mesh(), parallel or ParallelConfig()
    for key, message in context_problems(mesh.layout, config):  # a wrong model would train without a word
        raise ConfigError(f"{key}: {message}")
    model = build_meta(config)
    cut(model, mesh, parallel, training.sequence_length)
    model.dtype, model.compute_device = DTYPES[training.precision], mesh.device
    deferring = mesh.pipeline is not None and parallel.schedule in ZERO_BUBBLE
    if training.fp8:
        use_float8(model, mesh, parallel)
    if finetune is not None:
        if finetune.method == "mora" and mesh.tensor is not None:
            raise ConfigError("finetune.method: mora's matrix meets all of a layer's features; set parallel.tensor=1")
        if finetune.method != "full" and parallel.async_tensor:
            raise ConfigError("parallel.async_tensor: a matmul that is one with its input has no place for updates")
        attach(model, finetune)
    shard_tensor(model, mesh, parallel)
    travelling = distribute_experts(model, mesh)
    recompute = training.activation_checkpointing
    budget = recompute.share if isinstance(recompute, BudgetConfig) else None
    for layers in (model.layers,) if model.multi_token is None else (model.layers, model.multi_token.layers):
        if training.compile and deferring:
            compile_between(layers, budget=budget)
        apply_activation_checkpointing(layers, recompute, random=finetune is not None and finetune.dropout > 0)
        if training.compile and not deferring:
            compile_layers(layers, apart=travelling, budget=budget)
        if offloads(recompute):
            offload_activations(layers, mesh.device)
    shard_data(model, mesh, parallel)
    model.to_empty(device="cpu" if parallel.cpu_offload else mesh.device)
    parts = parts_of(model)
    return model.initialise(seed, pieces=lambda name, parameter: pieces(parameter, parts.get(name, ())))


def build_state(model: Transformer, optimizer: OptimizerConfig, training: TrainingConfig) -> TrainState:
    """The model with its optimizers, before the first step."""
    device = model.device
    scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "fp16")
    return TrainState(model, optimizer.build(model), scaler)
