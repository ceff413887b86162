"""A tiny model, and updates with values of their own."""

from typing import Any

import torch

from treadle.config import resolve
from treadle.finetune import FinetuneConfig
from treadle.finetune.attach import prepare, saved_parameters
from treadle.nn.transformer import Transformer, TransformerConfig

ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "bias": True}
GATED = {"kind": "gated", "dim": 48}
MOE = {"kind": "moe", "experts": 4, "top_k": 2, "dim": 16, "balance_bias": 0.01}


def layer(feedforward: Any = None, repeat: int = 2) -> dict[str, Any]:
    return {"kind": "pre_norm", "repeat": repeat, "mixer": ATTENTION, "feedforward": feedforward or GATED}


def spec(*layers: dict[str, Any], **changes: Any) -> TransformerConfig:
    plain = {"dim": 32, "vocab_size": 64, "max_length": 64, "layers": list(layers) or [layer()]}
    return resolve(TransformerConfig, {**plain, **changes})


def base(*layers: dict[str, Any], **changes: Any) -> Transformer:
    """With larger weights than a model starts with, so that updates of them are not lost in the last digits."""
    model = spec(*layers, **changes).build().initialise(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1 if "bias" in name else 0.0)
    return model.eval()


def tuned(config: dict[str, Any], *layers: dict[str, Any], varied: bool = True) -> Transformer:
    """varied: updates have moved, as if they were trained."""
    model = prepare(base(*layers), resolve(FinetuneConfig, config)).eval()
    if varied:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in saved_parameters(model):
                if "0." not in name.rpartition("updates.")[2]:  # PiSSA's beginnings stay
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(2))
