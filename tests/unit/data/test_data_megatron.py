"""Megatron-LM's .bin/.idx, written here byte by byte from its published layout."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_zoo import written

from treadle.data.config import DataConfig
from treadle.data.loader import Loader, Sequential
from treadle.data.megatron import MegatronDataset
from treadle.data.prepare import prepare
from treadle.data.tokenizer import BytesTokenizerConfig
from treadle.errors import DataError

# Three sequences in two documents: the second document is sequences 1 and 2.
SEQUENCES = [[5, 6, 0], [7, 8], [9, 0]]
FIRSTS = [0, 1, 3]


def index(code: int, size: int, lengths: list[int], firsts: list[int]) -> bytes:
    starts = [size * sum(lengths[:i]) for i in range(len(lengths))]
    content = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code])
    content += len(lengths).to_bytes(8, "little") + len(firsts).to_bytes(8, "little")
    content += b"".join(n.to_bytes(4, "little") for n in lengths)
    content += b"".join(n.to_bytes(8, "little") for n in starts)
    return content + b"".join(n.to_bytes(8, "little") for n in firsts)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    path = tmp_path / "corpus_text_document"
    path.with_suffix(".idx").write_bytes(index(8, 2, [3, 2, 2], FIRSTS))
    path.with_suffix(".bin").write_bytes(b"".join(t.to_bytes(2, "little") for s in SEQUENCES for t in s))
    return path


def test_documents_come_back(prefix: Path) -> None:
    dataset = MegatronDataset(prefix, vocab_size=10)
    assert [document.tolist() for document in dataset.each_document()] == [[5, 6, 0], [7, 8, 9, 0]]
    assert (dataset.tokens, dataset.documents, dataset.bytes) == (7, 2, None)
    dataset.verify()


@pytest.mark.parametrize(("code", "pack"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_integer_type(tmp_path: Path, code: int, pack: str) -> None:
    tokens = [1, 2, 0, 100, 0]
    (tmp_path / "x.idx").write_bytes(index(code, struct.calcsize(pack), [3, 2], [0, 1, 2]))
    (tmp_path / "x.bin").write_bytes(struct.pack(f"<5{pack}", *tokens))
    assert np.concatenate(list(MegatronDataset(tmp_path / "x").each_document())).tolist() == tokens


def test_the_loader_cannot_tell_it_from_shards(prefix: Path, tmp_path: Path) -> None:
    shards = written(tmp_path / "d", [[5, 6, 0], [7, 8, 9, 0]])
    megatron = MegatronDataset(prefix, eos_id=0)
    one, other = (Loader([d], sequence_length=2, batch_size=4, seed=3) for d in (megatron, shards))
    for step in range(3):
        assert one.batch(step).tokens_BS.tolist() == other.batch(step).tokens_BS.tolist()
        assert one.batch(step).targets_BS.tolist() == other.batch(step).targets_BS.tolist()
        assert one.batch(step).context.documents_BS.equal(other.batch(step).context.documents_BS)


@pytest.mark.parametrize("eos_id", [None, 3])
def test_without_an_end_of_text_nothing_is_predicted_across_documents(prefix: Path, eos_id: int | None) -> None:
    batch = Sequential(MegatronDataset(prefix, eos_id=eos_id), sequence_length=6, batch_size=1).batch(0)
    assert batch.tokens_BS.tolist() == [[5, 6, 0, 7, 8, 9]]
    assert batch.targets_BS.tolist() == [[6, 0, -100, 8, 9, 0]]
    assert batch.context.positions_BS.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.valid_tokens == 5
    ended = Sequential(MegatronDataset(prefix, eos_id=0), sequence_length=6, batch_size=1).batch(0)
    assert ended.targets_BS.tolist() == [[6, 0, 7, 8, 9, 0]]
    assert ended.context.positions_BS.tolist() == [[0, 1, 0, 1, 2, 3]]


def test_a_recipe_trains_on_it(prefix: Path, tmp_path: Path) -> None:
    tokenizer = BytesTokenizerConfig().build().save(tmp_path / "tokenizer")
    config = {
        "datasets": [{"kind": "megatron", "path": prefix, "validation": prefix, "vocab_size": 257}],
        "tokenizer": {"kind": "file", "path": tokenizer},
    }
    data = prepare(DataConfig.model_validate(config))
    assert data.train[0].tokens == data.validation[prefix.name].tokens == 7
    assert data.train[0].eos_id == data.tokenizer.eos_id
    del config["datasets"][0]["vocab_size"]
    assert prepare(DataConfig.model_validate(config)).train[0].vocab_size == 257


@pytest.mark.parametrize("vocab_size", [None, 10])
def test_negative_ids_are_refused(tmp_path: Path, vocab_size: int | None) -> None:
    (tmp_path / "x.idx").write_bytes(index(4, 4, [5], [0, 1]))
    (tmp_path / "x.bin").write_bytes(struct.pack("<5i", 1, 2, -7, 4, 0))
    with pytest.raises(DataError, match=r"x\.bin: token 2 is -7, expected an id of at least 0"):
        Loader([MegatronDataset(tmp_path / "x", vocab_size=vocab_size)], sequence_length=4, batch_size=1).batch(0)


def test_every_cut_of_either_file_is_refused(prefix: Path) -> None:
    for suffix in (".idx", ".bin"):
        file = prefix.with_suffix(suffix)
        whole = file.read_bytes()
        for size in range(len(whole)):
            file.write_bytes(whole[:size])
            with pytest.raises(DataError, match=suffix[1:]):
                MegatronDataset(prefix)
        file.write_bytes(whole)
    (prefix.with_suffix(".bin")).unlink()
    with pytest.raises(DataError, match="missing"):
        MegatronDataset(prefix)
    with pytest.raises(DataError, match=r"without \.bin or \.idx"):
        MegatronDataset(prefix.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"MMIDIDY" + b[7:], "not a Megatron index"),
        (lambda b: b[:9] + b"\x02" + b[10:], "version 2"),
        (lambda b: b[:17] + b"\x06" + b[18:], "dtype code 6"),
        (lambda b: b[:46] + b"\x01" + b[47:], "sequence 0 is at byte 1, expected 0"),
        (lambda b: b[:-8] + b"\x02" + b[-7:], "documents do not rise from 0 to 3"),
    ],
)
def test_a_damaged_index_is_refused(prefix: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = prefix.with_suffix(".idx")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message):
        MegatronDataset(prefix)


def test_ids_outside_of_the_vocabulary_are_refused(prefix: Path) -> None:
    with pytest.raises(DataError, match=r"token 4 is 8, expected an id below the vocabulary size 8"):
        MegatronDataset(prefix, vocab_size=8).verify()
