"""Everything that a training step changes, and so everything that a checkpoint holds."""

import base64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from treadle.finetune.attach import saved_parameters
from treadle.nn.transformer import Transformer
from treadle.parallel.shards import checkpointed, parts_of
from treadle.train.optimizers import Optimizers

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class TrainState:
    """step: optimizer steps done. tokens: valid tokens seen. scaler: the fp16 loss scaler, else disabled."""

    model: Transformer
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    step: int = 0
    tokens: int = 0
    flops: float = 0.0

    def tensors(self) -> dict[str, Any]:
        """The state as nested tensors, aliasing the live ones (parameters by name, shared ones once)."""
        optimizer, parts = self._optimizer(), parts_of(self.model)
        return {
            "model": {n: checkpointed(p.detach(), parts.get(n, ())) for n, p in saved_parameters(self.model)},
            # Keys are "state.<parameter>.<quantity>".
            "optimizer": {
                key: checkpointed(value, parts.get(key.removeprefix("state.").rpartition(".")[0], ()))
                for key, value in optimizer.items()
                if isinstance(value, Tensor)
            },
        }

    def restore(self, tensors: dict[str, Any]) -> None:
        """Take over what a checkpoint held. Tensors were loaded in place; numbers that a tensor holds are set here."""
        live = self._optimizer()
        live.update({key: value for key, value in tensors["optimizer"].items() if isinstance(value, Tensor)})
        set_optimizer_state_dict(self.model, self.optimizers.optimizers, live, options=_FLAT)

    def _optimizer(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizers.optimizers, options=_FLAT)

    def facts(self) -> dict[str, Any]:
        """The state's plain numbers, and the generators' states as text."""
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            rng["cuda"] = torch.cuda.get_rng_state()
        return {
            "step": self.step,
            "tokens": self.tokens,
            "flops": self.flops,
            "scaler": self.scaler.state_dict(),
            "rng": {device: base64.b64encode(bytes(state.tolist())).decode() for device, state in rng.items()},
        }

    def restore_facts(self, facts: dict[str, Any]) -> None:
        self.step, self.tokens, self.flops = facts["step"], facts["tokens"], facts["flops"]
        if facts["scaler"]:  # empty if the run was not in fp16 until now
            self.scaler.load_state_dict(facts["scaler"])
        for device, text in facts["rng"].items():
            state = torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
            if device == "cpu":
                torch.set_rng_state(state)
            elif torch.cuda.is_initialized():  # a run may go on without the GPU that it began on
                torch.cuda.set_rng_state(state)
