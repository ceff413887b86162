"""Perplexity against counting by hand, and against a loop over documents with plain logits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_zoo import VOCABULARY, dataset, documents, make_model, training_config

from treadle.data.loader import Sequential
from treadle.data.tokenizer import BytesTokenizerConfig
from treadle.evaluate.perplexity import evaluate_perplexity

TOKENIZER = BytesTokenizerConfig().build()
TEXTS = ["Grüße", "a", "the quick brown fox jumps over the lazy dog", "日本語 text", "end"]


def held_out(texts, vocabulary, isolate_documents, sequence_length=8):
    return Sequential(
        dataset(texts, vocabulary),
        sequence_length=sequence_length,
        batch_size=3,
        isolate_documents=isolate_documents,
    )


@pytest.mark.parametrize("isolate_documents", [True, False])
def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token(isolate_documents):
    """Each document is its bytes and an end, and the end opens the next: only the stream's first byte is given."""
    model = make_model(vocab_size=TOKENIZER.vocab_size)
    model.head.weight.data.zero_()
    texts = [np.array([*text.encode(), TOKENIZER.eos_id]) for text in TEXTS]
    data = held_out(texts, TOKENIZER.vocab_size, isolate_documents)
    lengths = [len(text.encode()) for text in TEXTS]
    tokens, text_bytes = sum(lengths) + len(TEXTS) - 1, sum(lengths) - 1
    result = evaluate_perplexity(model, data, data.predicted_bytes(TOKENIZER.token_bytes()))
    assert (result.tokens, result.bytes) == (tokens, text_bytes)
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)
    assert result.perplexity == pytest.approx(257, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(257) * tokens / text_bytes, rel=1e-6)
    assert set(result.metrics()) == {"loss", "perplexity", "bits_per_byte"}


def naive(model, texts, sequence_length, isolate_documents):
    """Nats and tokens: every stretch that can see itself goes through the model alone, in rows of the stream."""
    stream = np.concatenate(texts)
    number = np.concatenate([np.append(np.full(len(text) - 1, i), i + 1) for i, text in enumerate(texts)])
    nats, tokens = 0.0, 0
    for start in range(0, len(stream) - 1, sequence_length):
        row = np.arange(start, min(start + sequence_length, len(stream) - 1))
        groups = [row[number[row] == n] for n in np.unique(number[row])] if isolate_documents else [row]
        for group in groups:
            logits = model(torch.from_numpy(stream[group].astype(np.int64))[None])[0]
            for place, scores in zip(group, logits, strict=True):
                nats -= F.log_softmax(scores.double(), -1)[int(stream[place + 1])].item()
                tokens += 1
    return nats, tokens


@pytest.mark.parametrize("isolate_documents", [True, False])
@pytest.mark.parametrize("sequence_length", [5, 16, 200])
def test_it_is_a_naive_loop(isolate_documents, sequence_length):
    texts = documents([3, 1, 11, 20, 2, 7, 30, 1, 1, 9])
    model = make_model(init={"kind": "normal", "std": 0.2}).eval()
    data = held_out(texts, VOCABULARY, isolate_documents, sequence_length)
    result = evaluate_perplexity(model, data, 100)
    with torch.no_grad():
        nats, tokens = naive(model, texts, sequence_length, isolate_documents)
    assert result.tokens == tokens
    assert result.nats == pytest.approx(nats, rel=1e-6)


def test_mode_and_gradients_are_left_alone():
    data = held_out(documents([20, 20]), VOCABULARY, True)
    for training in (True, False):
        model = make_model(training_config()).train(training)
        model.norm.weight.grad = torch.ones(32)
        evaluate_perplexity(model, data, 10)
        assert model.training is training
        assert torch.equal(model.norm.weight.grad, torch.ones(32))
        assert model.embedding.weight.grad is None


def test_perplexity_of_a_hopeless_model_is_finite():
    model = make_model()
    model.head.weight.data.mul_(1e6)
    result = evaluate_perplexity(model, held_out(documents([40]), VOCABULARY, True), 10)
    assert math.isfinite(result.perplexity)
