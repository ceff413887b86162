"""A small recipe schema with every shape that a schema can have."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from treadle.config import Config, Kind, key_error, key_errors


class Norm(Kind):
    """A family with a member that has no keys of its own."""


class RMS(Norm):
    kind: Literal["rms"] = "rms"


class Mixer(Kind):
    """A family whose members share a key."""

    bias: bool = False


class Attention(Mixer):
    """Attention."""

    kind: Literal["attention"] = "attention"
    heads: PositiveInt = Field(8, description="query heads")
    kv_heads: PositiveInt | None = None
    window: PositiveInt | None = None
    norm: Norm | None = RMS()

    @model_validator(mode="after")
    def _heads_divide(self) -> "Attention":
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise key_error("kv_heads", f"{self.kv_heads} does not divide heads={self.heads}; try 1, 2, 4, 8")
        return self


class Convolution(Mixer):
    kind: Literal["convolution"] = "convolution"
    width: PositiveInt = 4


class Layer(Kind):
    """A family that holds other families, and itself."""


class Block(Layer):
    kind: Literal["block"] = "block"
    mixer: Mixer = Attention()
    activation: Literal["silu", "gelu"] = "silu"


class Cycle(Layer):
    kind: Literal["cycle"] = "cycle"
    layers: list[Layer]


class Source(Config):
    path: Path
    weight: PositiveFloat = 1.0


class Model(Config):
    dim: PositiveInt = 64
    layers: list[Layer] = Field([Block()], min_length=1)

    @model_validator(mode="after")
    def _layers_fit(self) -> "Model":
        mixers = [(index, layer.mixer) for index, layer in enumerate(self.layers) if isinstance(layer, Block)]
        problems = [
            (f"layers.{index}.mixer.heads", f"{mixer.heads} does not divide dim={self.dim}")
            for index, mixer in mixers
            if isinstance(mixer, Attention) and self.dim % mixer.heads
        ]
        if problems:
            raise key_errors(problems)
        return self


class Recipe(Config):
    """The whole."""

    imports: tuple[str, ...] = ()
    name: str = "run"
    seed: int = 0
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.5
    steps: int | Literal["auto"] = "auto"
    betas: tuple[float, float] = (0.9, 0.95)
    prompts: list[str] = Field([])
    model: Model = Model()
    sources: dict[str, Source] = Field({})
    data: Source | list[Source] | None = None
