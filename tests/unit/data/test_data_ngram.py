"""The n-gram baseline against counting by hand, in plain Python."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data import ngram
from treadle.data.config import DataConfig
from treadle.data.ngram import END, MAX_ORDER, SYMBOLS, NgramModel
from treadle.data.prepare import prepare
from treadle.errors import ConfigError, DataError

TRAINING = [b"abracadabra", b"a", b"", b"banana\xff\x00", b"abab"]
HELD_OUT = [b"abra", b"zzz", b"", b"nab\xff"]
SHAKESPEARE = Path(__file__).parents[4] / "shared/data/tinyshakespeare.txt"


def padded(document: bytes, order: int) -> list[int]:
    return [END] * (order - 1) + list(document) + [END]


def by_hand(training: list[bytes], order: int, context: tuple[int, ...], symbol: int) -> float:
    """Witten-Bell by its definition, with dictionaries."""
    p = 1 / SYMBOLS
    for n in range(1, order + 1):
        after: Counter[int] = Counter()
        seen = context[len(context) - n + 1 :]
        for document in filter(None, training):
            symbols = padded(document, order)
            for i in range(order - 1, len(symbols)):
                if tuple(symbols[i - n + 1 : i]) == seen:
                    after[symbols[i]] += 1
        if after:
            p = (after[symbol] + len(after) * p) / (after.total() + len(after))
    return p


def packed(context: tuple[int, ...], symbol: int) -> int:
    value = 0
    for part in (*context, symbol):
        value = value << 9 | part
    return value


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_bits_per_byte_equal_counting_by_hand(order: int) -> None:
    bits = 0.0
    for document in filter(None, HELD_OUT):
        symbols = padded(document, order)
        for i in range(order - 1, len(symbols)):
            bits -= math.log2(by_hand(TRAINING, order, tuple(symbols[i - order + 1 : i]), symbols[i]))
    expected = bits / sum(map(len, HELD_OUT))
    assert NgramModel(TRAINING, order).bits_per_byte(HELD_OUT) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=6), st.binary(min_size=4, max_size=4))
def test_probabilities_sum_to_one(training: list[bytes], context: bytes) -> None:
    model = NgramModel(training, 5)
    for before in (tuple(context), (END, END, END, END), (*training[0][-4:].rjust(4, b"x"),)):
        grams = np.array([packed(before, symbol) for symbol in range(SYMBOLS)], dtype=np.uint64)
        p = model.probabilities(grams)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p > 0).all()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole = NgramModel(TRAINING, 4)
    monkeypatch.setattr(ngram, "CHUNK", chunk)
    cut = NgramModel(TRAINING, 4)
    for one, other in zip(whole.orders, cut.orders, strict=True):
        assert one.grams.tolist() == other.grams.tolist()
        assert one.counts.tolist() == other.counts.tolist()
    assert cut.bits_per_byte(HELD_OUT) == pytest.approx(whole.bits_per_byte(HELD_OUT), rel=1e-12)


def test_no_text_and_impossible_orders_are_refused() -> None:
    with pytest.raises(DataError, match="no text to count"):
        NgramModel([b""])
    with pytest.raises(DataError, match="no text to measure"):
        NgramModel([b"a"]).bits_per_byte([])
    with pytest.raises(ConfigError, match="order: 8; expected 1 to 7"):
        NgramModel([b"a"], MAX_ORDER + 1)


def test_one_model_measures_every_held_out_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"a": b"abracadabra", "b": b"banana"}.items():
        (tmp_path / name).write_bytes(b"#".join(text + b"%d" % i for i in range(60)))
    sources = [{"kind": "text", "paths": str(tmp_path / name), "separator": "#"} for name in "ab"]
    raw = {"sources": sources, "tokenizer": "bytes", "held_out": 0.3, "workers": 1, "cache": tmp_path / "cache"}
    data = prepare(DataConfig.model_validate(raw), progress=False)
    training, held = (
        [[bytes(d[:-1].tolist()) for d in dataset.each_document()] for dataset in side]
        for side in (data.train, data.validation.values())
    )
    model = NgramModel([text for texts in training for text in texts], 3)
    made: list[int] = []
    monkeypatch.setattr(ngram, "NgramModel", lambda *a: made.append(1) or NgramModel(*a))
    bits = ngram.ngram_bits_per_byte(data, 3)
    assert made == [1]
    assert bits == {f"text-{i}": pytest.approx(model.bits_per_byte(held[i])) for i in range(2)}


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs ../shared/data/tinyshakespeare.txt")
def test_longer_contexts_help_on_real_text() -> None:
    text = SHAKESPEARE.read_bytes()
    bits = [NgramModel([text[:1_000_000]], order).bits_per_byte([text[1_000_000:]]) for order in (1, 2, 3, 5)]
    assert bits == sorted(bits, reverse=True)
    assert 4 < bits[0] < 5  # the entropy of single letters
    assert bits[-1] < 2.5
