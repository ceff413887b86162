"""The `finetune` section of a recipe: what of the model is trained, and how."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from treadle.config import Config, key_errors

Method = Literal["full", "lora", "dora", "mora", "adapter", "ia3"]

# Keys that belong to some methods only.
KEYS: dict[str, tuple[Method, ...]] = {
    "targets": ("lora", "dora", "mora", "adapter", "ia3"),
    "trainable": ("lora", "dora", "mora", "adapter", "ia3"),
    "rank": ("lora", "dora", "mora", "adapter"),
    "alpha": ("lora", "dora"),
    "rs": ("lora", "dora"),
    "dropout": ("lora", "dora", "mora", "adapter"),
    "init": ("lora",),
    "lr_ratio": ("lora", "dora"),
    "mora_type": ("mora",),
    "placement": ("adapter",),
    "scale": ("adapter",),
}
LINEAR = ["layers.**"]
DEFAULT_TARGETS: dict[str, list[str]] = {
    "lora": LINEAR,
    "dora": LINEAR,
    "mora": LINEAR,
    "ia3": ["layers.*.mixer.qkv.k", "layers.*.mixer.qkv.v", "layers.*.feedforward.down"],
    "houlsby": ["layers.*.mixer", "layers.*.feedforward"],
    "pfeiffer": ["layers.*.feedforward"],
    "parallel": ["layers.*.feedforward"],
}


class FinetuneConfig(Config):
    """full trains all weights; the others leave them as they are, and train what they put beside them."""

    method: Method = Field(
        "lora",
        description="full; lora (arXiv:2106.09685); dora (2402.09353); mora (2405.12130); adapter, bottlenecks between "
        "blocks; ia3 (2205.05638)",
    )
    targets: dict[str, PositiveInt] | list[str] | None = Field(
        None,
        description="patterns of module names (* a word, ** any), alone or with their rank; parts of fused projections "
        "as qkv.q; the last that fits decides; null: the method's own",
    )
    rank: PositiveInt = Field(8, description="of targets that name none; width of a bottleneck")
    alpha: PositiveFloat = Field(16.0, description="an update is scaled by alpha / rank")
    rs: bool = Field(False, description="by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what an update reads")
    init: Literal["zero", "pissa"] = Field(
        "zero", description="an update starts as zero, or as the weight's largest singular vectors (arXiv:2404.02948)"
    )
    lr_ratio: PositiveFloat = Field(1.0, description="rate of B by that of A (LoRA+, arXiv:2402.12354: 16)")
    mora_type: Literal[1, 2, 3, 4, 6] = Field(
        6, description="how inputs and outputs meet the square matrix: 1 shared, 2 to 4 in groups, 6 rotated"
    )
    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby",
        description="after mixer and feed-forward (1902.00751), after the latter (2005.00247), beside it (2110.04366)",
    )
    scale: PositiveFloat = Field(1.0, description="factor on what a bottleneck adds (parallel: 4)")
    trainable: list[str] = Field([], description="patterns of weights of the model that are trained as well")
    merge: bool = Field(True, description="write the whole model with its updates at the end, where they can be merged")

    @model_validator(mode="after")
    def _keys_belong_to_the_method(self) -> "FinetuneConfig":
        fields = type(self).model_fields
        wrong = [
            (key, f"has no meaning with method={self.method}; it belongs to {', '.join(methods)}")
            for key, methods in KEYS.items()
            if self.method not in methods and getattr(self, key) != fields[key].get_default()
        ]
        if wrong:
            raise key_errors(wrong)
        return self

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by pattern, the method's own where none are given."""
        if isinstance(self.targets, dict):
            return self.targets
        patterns = self.targets
        if patterns is None:
            patterns = DEFAULT_TARGETS[self.placement if self.method == "adapter" else self.method]
        return dict.fromkeys(patterns, 1 if self.method == "ia3" else self.rank)

    @property
    def mergeable(self) -> bool:
        """Whether the model with its updates is a model of the same kind."""
        return self.method != "adapter"
