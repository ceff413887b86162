"""Tiny models, token streams with known documents, and training states made of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from treadle.config import resolve
from treadle.data.dataset import Part, TokenDataset
from treadle.data.loader import Loader
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.train.config import TrainingConfig
from treadle.train.optimizers import AdamWConfig, OptimizerConfig
from treadle.train.setup import build_model, build_state
from treadle.train.state import TrainState

VOCABULARY, EOS, LENGTH = 64, 0, 16


def spec(**changes: Any) -> TransformerConfig:
    """Two layers of width 32 with grouped queries."""
    layer = {
        "kind": "pre_norm",
        "repeat": 2,
        "mixer": {"kind": "attention", "heads": 2, "kv_heads": 1},
        "feedforward": {"kind": "gated", "dim": 64},
    }
    plain = {"dim": 32, "vocab_size": VOCABULARY, "max_length": 64, "layers": [layer]}
    return resolve(TransformerConfig, {**plain, **changes})


def make_model(training: TrainingConfig | None = None, seed: int = 0, **changes: Any) -> Transformer:
    return build_model(spec(**changes), training or training_config(), seed=seed)


def training_config(**changes: Any) -> TrainingConfig:
    plain = {"steps": 10, "sequence_length": LENGTH, "batch_size": 4, "precision": "fp32", "compile": False}
    return TrainingConfig(**{**plain, **changes})


def make_state(training: TrainingConfig, optimizer: OptimizerConfig | None = None, **changes: Any) -> TrainState:
    return build_state(make_model(training, **changes), optimizer or AdamWConfig(lr=3e-3), training)


def documents(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Documents of these lengths, each a walk in small steps (so that there is something to learn), then the end."""
    generator = np.random.default_rng(seed)
    texts = []
    for length in lengths:
        walk = np.cumsum(generator.integers(1, 4, length)) % (VOCABULARY - 1) + 1
        texts.append(np.concatenate([walk, [EOS]]))
    return texts


def dataset(texts: Sequence[np.ndarray], vocabulary: int = VOCABULARY) -> TokenDataset:
    offsets = np.cumsum([0, *(len(text) for text in texts)])
    part = Part("memory", np.concatenate(list(texts)).astype(np.uint16), offsets)
    return TokenDataset("memory", [part], fingerprint="memory", vocab_size=vocabulary)


def make_loader(batch_size: int = 4, *, isolate_documents: bool = True, seed: int = 0) -> Loader:
    """Documents much shorter than a row, so that every row has ignored targets, and rows have different numbers."""
    lengths = np.random.default_rng(seed).integers(1, 20, 200).tolist()
    return Loader(
        [dataset(documents(lengths, seed))],
        sequence_length=LENGTH,
        batch_size=batch_size,
        seed=seed,
        isolate_documents=isolate_documents,
    )


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}
