"""recipes/models: every published size has the published number of parameters, by our count and by transformers'."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle.config import resolve
from treadle.families.family import Family, families
from treadle.nn.flops import parameter_count
from treadle.nn.store import build_meta
from treadle.nn.transformer import TransformerConfig

FOLDER = Path(__file__).parents[2] / "recipes/models"
HEAD = re.compile(r"# .+: ([\d,]+) parameters\. model_type (\w+)\n")
PUBLISHED = {path.stem: found for path in sorted(FOLDER.glob("*.yaml")) if (found := HEAD.match(path.read_text()))}
SMALLEST: dict[str, str] = {}  # of each family, for transformers builds the large ones slowly
for _name, _found in sorted(PUBLISHED.items(), key=lambda item: int(item[1][1].replace(",", ""))):
    SMALLEST.setdefault(_found[2], _name)


def spec(name: str) -> TransformerConfig:
    return resolve(TransformerConfig, FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_the_published_count_and_is_of_its_family(name: str) -> None:
    count, model_type = PUBLISHED[name].groups()
    model = spec(name)
    assert parameter_count(build_meta(model)) == int(count.replace(",", ""))
    assert Family.registry[model_type].config(model)["model_type"] == model_type


def test_every_family_has_a_size() -> None:
    assert {family.model_type for family in families()} == {found[2] for found in PUBLISHED.values()}


@pytest.mark.parametrize("name", SMALLEST.values())
def test_transformers_counts_as_many(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    count, model_type = PUBLISHED[name].groups()
    written = Family.registry[model_type].config(spec(name))
    config: Any = transformers.AutoConfig.for_model(**{k: v for k, v in written.items() if k != "architectures"})
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config)
    biases = [b for name, b in peer.named_buffers() if name.endswith("correction_bias")]  # a parameter, to others
    assert sum(tensor.numel() for tensor in (*peer.parameters(), *biases)) == int(count.replace(",", ""))


def test_the_page_lists_every_family() -> None:
    page = (FOLDER.parents[1] / "docs/families.md").read_text()
    table = page.partition("## Which")[2].partition("\n## ")[0]
    assert {
        name for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"\w+", line)
    } == {family.model_type for family in families()}
    assert f", {len(PUBLISHED)} of them," in page
