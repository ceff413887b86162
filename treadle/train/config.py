"""How a training run goes, whatever its loss: steps, batch, precision, saving."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from treadle.config import Config
from treadle.config.base import key_error
from treadle.parallel.activation_checkpointing import BudgetConfig, CheckpointingConfig, NoneConfig

Precision = Literal["bf16", "fp16", "fp32"]


class TrainingConfig(Config):
    """The loop."""

    steps: PositiveInt = Field(description="optimizer steps")
    sequence_length: PositiveInt = Field(description="tokens in a row")
    batch_size: PositiveInt = Field(description="rows of the global batch")
    micro_batch_size: PositiveInt | None = Field(None, description="rows at a time, gradients accumulate; null: all")
    precision: Precision = Field("bf16", description="compute dtype; master weights are fp32, fp16 uses a loss scaler")
    clip_norm: PositiveFloat | None = Field(1.0, description="scale gradients down to this global norm; null: never")
    z_loss: NonNegativeFloat = Field(0.0, description="weight of the squared log partition function")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over the vocabulary")
    attention: Literal["auto", "reference", "sdpa", "flash", "flash4", "flex", "tilelang"] = Field(
        "auto", description="attention backend"
    )
    activation_checkpointing: CheckpointingConfig = Field(
        NoneConfig(), description="what is kept for the backward: none, selective, full, budget, offload"
    )
    fp8: bool = Field(False, description="matmuls of layers in fp8, forward and backward (Hopper, Ada or later)")
    compile: bool = Field(True, description="torch.compile each layer")
    log_every: PositiveInt = Field(10, description="steps between logged metrics")

    @property
    def rows(self) -> int:
        """Rows that go through the model at a time."""
        return self.micro_batch_size or self.batch_size

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> "TrainingConfig":
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise key_error("micro_batch_size", f"{self.micro_batch_size} does not divide batch_size={self.batch_size}")
        return self

    @model_validator(mode="after")
    def _budget_is_compiled(self) -> "TrainingConfig":
        if isinstance(self.activation_checkpointing, BudgetConfig) and not self.compile:
            message = "budget is kept by the compiler, and training.compile is false; set it to true, or try selective"
            raise key_error("activation_checkpointing", message)
        return self


class CheckpointConfig(Config):
    """What is saved while a run goes on."""

    every: PositiveInt | None = Field(500, description="steps between checkpoints; null: only at the end")
    keep: PositiveInt = Field(2, description="how many of the latest to keep")
    keep_every: PositiveInt | None = Field(None, description="also keep those at multiples of this step for good")
    asynchronous: bool = Field(True, description="write in the background while training goes on")
