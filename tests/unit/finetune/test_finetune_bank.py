"""Several adapters in one batch: each row is that of the model with its adapter alone."""

import pytest
import torch
from finetune_zoo import base, tokens, tuned

from treadle.errors import ConfigError
from treadle.finetune.bank import add_banks, use_adapters
from treadle.nn.store import save_model
from treadle.train.adapters import AdapterFacts, add_adapters, save_adapter
from treadle.train.weights import fingerprint

CONFIGS = {
    "a": {"rank": 4},
    "b": {"targets": {"layers.*.mixer.qkv.v": 2, "layers.0.feedforward.down": 7}, "rs": True},
}


def test_each_row_has_its_own():
    alone = {name: tuned(config) for name, config in CONFIGS.items()}
    model = base()
    add_banks(model, alone)
    with torch.no_grad():
        for names in (["b", None, "a"], ["a", "a", "b"], [None] * 3):
            with use_adapters(model, names):
                found = model(tokens())
            for row, name in enumerate(names):
                expected = (base() if name is None else alone[name])(tokens())[row]
                torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(model(tokens()), base()(tokens()))


def test_they_come_from_folders(tmp_path):
    save_model(base(), tmp_path / "weights")
    for name, config in CONFIGS.items():
        other = tuned(config)
        other_config = {"base": tmp_path / "weights", "fingerprint": fingerprint(tmp_path / "weights")}
        save_adapter(other, tmp_path / name, AdapterFacts(**other_config, finetune=config))
    model = base()
    add_adapters(model, {name: tmp_path / name for name in CONFIGS})
    with torch.no_grad(), use_adapters(model, ["a", "b", None]):
        torch.testing.assert_close(model(tokens())[1], tuned(CONFIGS["b"])(tokens())[1], atol=2e-5, rtol=1e-5)


def test_what_cannot_be_chosen_is_refused():
    model = base()
    with pytest.raises(ConfigError, match="plain LoRA"):
        add_banks(model, {"d": tuned({"method": "dora"})})
    add_banks(model, {"first": tuned({"rank": 2})})
    with pytest.raises(ConfigError, match=r"'frist' is not loaded.*first"), use_adapters(model, ["frist"]):
        pass
