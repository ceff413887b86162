"""Windows of several lengths against a loop over the stream; LongRoPE's search against where it began."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_zoo import copied, dataset, make_model

from treadle.data.loader import Loader
from treadle.data.prepare import Prepared
from treadle.data.tokenizer import BytesTokenizerConfig
from treadle.errors import ConfigError
from treadle.evaluate.lengths import evaluate_lengths
from treadle.evaluate.longrope import beginnings, child, evolve, search_divisors, total_nats, with_scaling
from treadle.nn.rope_scaling import LinearScalingConfig, LongRopeScalingConfig

TOKENIZER = BytesTokenizerConfig().build()
TEXTS = ["Grüße", "a", "the quick brown fox jumps over the lazy dog", "日本語 text", "end"]


def prepared(*names):
    texts = [np.array([*text.encode(), TOKENIZER.eos_id]) for text in TEXTS]
    data = dataset(texts, TOKENIZER.vocab_size)
    return Prepared((Path("memory"),), TOKENIZER, (data,), (1.0,), dict.fromkeys(names, data))


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_windows_by_hand(position, batch_tokens):
    layer = {"kind": "pre_norm", "mixer": {"kind": "attention", "heads": 2, "position": position}}
    layers = [{**layer, "feedforward": {"kind": "gated", "dim": 64}}]
    model = make_model(vocab_size=TOKENIZER.vocab_size, layers=layers, init={"kind": "normal", "std": 0.2})
    stream = [token for text in TEXTS for token in (*text.encode(), TOKENIZER.eos_id)]
    text_bytes = sum(len(text.encode()) for text in TEXTS) - 1
    results = evaluate_lengths(model, prepared("one", "two"), [5, 16, 300], batch_tokens=batch_tokens)
    assert list(results) == ["one", "two"]
    assert results["one"] == results["two"]
    for length, result in results["one"].items():
        nats = 0.0
        for start in range(0, len(stream) - 1, length):
            window = stream[start : start + length + 1]
            with torch.no_grad():
                logits = model(torch.tensor([window[:-1]]))[0]
            nats += F.cross_entropy(logits.double(), torch.tensor(window[1:]), reduction="sum").item()
        assert result.tokens == len(stream) - 1, "the same tokens at every length"
        assert result.nats == pytest.approx(nats, rel=1e-6)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def test_a_learned_table_ends():
    model = make_model(vocab_size=TOKENIZER.vocab_size, position="learned", max_length=32)
    assert evaluate_lengths(model, prepared("text"), [32])
    with pytest.raises(ConfigError, match="windows of 33 tokens: the model's learned positions end at 32"):
        evaluate_lengths(model, prepared("text"), [33])


@pytest.mark.parametrize("tied", [False, True])
def test_another_scaling_of_the_same_weights(tied):
    scaling = {"kind": "linear", "factor": 4.0}
    mixer = {"kind": "attention", "heads": 2, "position": {"kind": "rope", "scaling": scaling}}
    layers = [{"kind": "pre_norm", "repeat": 2, "mixer": mixer, "feedforward": {"kind": "gated", "dim": 64}}]
    plain_layers = [{**layers[0], "mixer": {"kind": "attention", "heads": 2}}]
    model, expected = make_model(layers=plain_layers, tied=tied), make_model(layers=layers, tied=tied)
    before = copied(model)
    scaled = with_scaling(model, LinearScalingConfig(factor=4.0))
    tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(scaled(tokens), expected(tokens))
        assert not torch.equal(scaled(tokens), model(tokens))
    assert (scaled.head.weight is scaled.embedding.weight) is tied
    assert scaled.config == expected.config
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    layers[0]["mixer"] = {**mixer, "position": "alibi"}
    with pytest.raises(ConfigError, match="no rotary positions"):
        with_scaling(make_model(layers=layers), LinearScalingConfig(factor=4.0))
    with pytest.raises(ConfigError, match="one number of rotary frequencies; the model's layers have none"):
        search_divisors(make_model(layers=layers), [], original_length=16)


def test_a_search_is_never_worse_than_where_it_began():
    model = make_model(init={"kind": "normal", "std": 0.3}).eval()
    texts = [np.random.default_rng(0).integers(1, 64, 400)]
    loader = Loader([dataset(texts)], sequence_length=64, batch_size=4, isolate_documents=False)
    batches = loader.micro_batches(0, 2)
    found = search_divisors(model, batches, original_length=16, generations=2, population=6)
    again = search_divisors(model, batches, original_length=16, generations=2, population=6)
    assert found == again
    assert (found.original_length, found.factor, len(found.long_factor)) == (16, 4.0, 8)
    cost = total_nats(with_scaling(model, found), batches, "auto")
    for divisors in beginnings(8, 4.0):
        first = LongRopeScalingConfig(short_factor=[1] * 8, long_factor=divisors, original_length=16, factor=4.0)
        assert cost <= total_nats(with_scaling(model, first), batches, "auto") + 1e-3  # divisors are rounded


def test_evolution_comes_near_a_hidden_optimum():
    hidden = np.array([1.0, 1.2, 1.5, 3.0, 7.0, 8.0])

    def cost(divisors):
        return float(np.square(np.log(divisors / hidden)).sum())

    start = beginnings(6, 8.0)
    found = evolve(cost, start, 8.0, np.random.default_rng(0), generations=40, population=20)
    assert cost(found) < 0.05 < 0.3 * min(map(cost, start))


def test_children_stay_in_bounds_and_never_fall():
    generator = np.random.default_rng(0)
    for _ in range(200):
        divisors = child(beginnings(8, 16.0), 16.0, generator)
        assert divisors.min() >= 1
        assert divisors.max() <= 20
        assert (np.diff(divisors) >= 0).all()
