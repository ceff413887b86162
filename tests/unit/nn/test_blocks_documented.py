"""docs/blocks.md names every kind, and its YAML is real."""

import re
from pathlib import Path

import yaml

from treadle.config import resolve
from treadle.nn.config import (
    AbsolutePositionConfig,
    FeedForwardConfig,
    LayerConfig,
    MixerConfig,
    NormConfig,
    PositionConfig,
    RouterConfig,
)
from treadle.nn.rope_scaling import RopeScalingConfig
from treadle.nn.transformer import TransformerConfig

PAGE = (Path(__file__).parents[3] / "docs/blocks.md").read_text()
FAMILIES = (
    LayerConfig,
    MixerConfig,
    FeedForwardConfig,
    NormConfig,
    PositionConfig,
    AbsolutePositionConfig,
    RopeScalingConfig,
    RouterConfig,
)
DENSE = {"kind": "dense", "dim": 8}
ATTENTION = {"kind": "attention", "heads": 32}


def ours(family: type) -> dict[str, type]:
    return {name: kind for name, kind in family.kinds().items() if kind.__module__.startswith("treadle.")}  # type: ignore[attr-defined]


def test_every_kind_is_listed() -> None:
    for family in FAMILIES:
        for name in ours(family):
            assert re.search(rf"(kind|router): {name}\b", PAGE), f"{family.__name__} '{name}' is not in docs/blocks.md"


def test_every_line_of_yaml_is_a_model() -> None:
    inline = [yaml.safe_load(text) for text in re.findall(r"^\| `(\{?kind:.*?)` \|", PAGE, re.MULTILINE)]
    fenced = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    blocks = [part["feedforward"] for part in fenced if "feedforward" in part]
    stacks = [part["layers"] for part in fenced if "layers" in part]
    assert len(inline) >= 14
    assert len(blocks) >= 4
    assert len(blocks) + len(stacks) == len(fenced)
    for layers in stacks:
        resolve(TransformerConfig, {"dim": 2048, "max_length": 64, "layers": layers})
    plain = {"kind": "pre_norm", "mixer": ATTENTION, "feedforward": DENSE}
    for block in [*inline, *blocks]:
        kind = block["kind"]
        if kind == "cycle":
            layer = {**block, "layers": [plain]}
        elif kind in ours(LayerConfig):
            layer = {**plain, **block}
        elif kind in ours(PositionConfig):
            layer = {**plain, "mixer": {**ATTENTION, "position": block}}
        else:
            families = {"mixer": MixerConfig, "feedforward": FeedForwardConfig, "norm": NormConfig}
            (part,) = [part for part, family in families.items() if kind in ours(family)]
            layer = {**plain, part: block}
        resolve(TransformerConfig, {"dim": 2048, "max_length": 64, "layers": [layer]})
