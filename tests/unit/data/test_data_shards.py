"""Shards on disk: what was written comes back, and nothing damaged is taken for it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_zoo import documents, shape, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.data.shards import MANIFEST, ShardDataset, ShardWriter
from treadle.errors import DataError

TEXTS = documents([5, 1, 3, 7, 2])


def flat(texts: list[list[int]]) -> list[int]:
    return [token for text in texts for token in text]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=20),
    limit=st.integers(1, 40),
    batch=st.integers(1, 7),
    vocab=st.sampled_from([100, 1 << 16, (1 << 16) + 1]),
)
def test_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], limit: int, batch: int, vocab: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, vocab_size=vocab, tokenizer="t", shard_tokens=limit) as writer:
        for first in range(0, len(texts), batch):
            group = texts[first : first + batch]
            writer.write(np.array(flat(group)), np.array([len(text) for text in group]), 3)
    dataset = ShardDataset(folder)
    assert [document.tolist() for document in dataset.each_document()] == texts
    assert [dataset.document(i).tolist() for i in range(dataset.documents)] == texts
    assert (dataset.tokens, dataset.documents) == (len(flat(texts)), len(texts))
    assert dataset.bytes == 3 * -(-len(texts) // batch)
    for part in dataset.parts:  # a shard is over its limit only where one document is
        assert len(part.tokens) <= limit or len(part.offsets) == 2
        assert part.tokens.dtype == (np.uint16 if vocab <= 1 << 16 else np.uint32)
    dataset.verify()


def test_files_are_plain_little_endian_arrays(tmp_path: Path) -> None:
    written(tmp_path / "d", TEXTS)
    assert (tmp_path / "d/00000.tokens").read_bytes() == b"".join(t.to_bytes(2, "little") for t in flat(TEXTS))
    offsets = [0, 5, 6, 9, 16, 18]
    assert (tmp_path / "d/00000.offsets").read_bytes() == b"".join(o.to_bytes(8, "little") for o in offsets)


def test_every_row_at_every_place_is_the_stream(tmp_path: Path) -> None:
    """Rows that lie in one shard, in two, and in many."""
    texts = documents(shape(0, 30, 6))
    stream = flat(texts)
    begins = set(np.cumsum([len(text) for text in texts]).tolist())
    dataset = written(tmp_path / "d", texts, shard_tokens=7)
    assert len(dataset.parts) > 5
    for length in (1, 4, 20):
        for start in range(len(stream) - length):
            inputs, targets = np.zeros(length, np.int64), np.zeros(length, np.int64)
            found = dataset.read(start, inputs, targets)
            assert inputs.tolist() == stream[start : start + length]
            assert targets.tolist() == stream[start + 1 : start + length + 1]
            assert found == sorted(b - start for b in begins if start < b <= start + length and b < len(stream))


@pytest.mark.parametrize("name", ["00000.tokens", "00000.offsets", MANIFEST])
def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path / "d", TEXTS)
    file = tmp_path / "d" / name
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=name):
            ShardDataset(tmp_path / "d")
    file.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match=name):
        ShardDataset(tmp_path / "d")
    file.write_bytes(whole)
    ShardDataset(tmp_path / "d").verify()


@pytest.mark.parametrize("name", ["00000.tokens", "00000.offsets"])
def test_any_flipped_bit_is_found_by_verify(tmp_path: Path, name: str) -> None:
    written(tmp_path / "d", TEXTS)
    file = tmp_path / "d" / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DataError, match=name):
            ShardDataset(tmp_path / "d").verify()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    written(tmp_path / "d", TEXTS)
    (tmp_path / "d/00000.offsets").unlink()
    with pytest.raises(DataError, match=r"00000\.offsets: missing, expected 48 bytes"):
        ShardDataset(tmp_path / "d")


def test_a_folder_without_manifest_is_no_dataset(tmp_path: Path) -> None:
    written(tmp_path / "d", TEXTS)
    (tmp_path / "d" / MANIFEST).unlink()
    with pytest.raises(DataError, match="no finished token shards"):
        ShardDataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"version": 2}, "version 2, expected 'treadle-tokens' version 1"),
        ({"tokens": 17}, "tokens is 17, its shards have 18"),
        ({"documents": 4}, "documents is 4, its shards have 5"),
        ({"dtype": "uint32"}, "36 bytes for 18 values"),
        ({"dtype": "float32"}, "dtype"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_a_foreign_or_damaged_manifest_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    written(tmp_path / "d", TEXTS)
    file = tmp_path / "d" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=message):
        ShardDataset(tmp_path / "d")


@pytest.mark.parametrize("name", ["../00000.tokens", "/etc/passwd", "sub/00000.tokens"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    written(tmp_path / "d", TEXTS)
    shutil.copy(tmp_path / "d/00000.tokens", tmp_path)
    file = tmp_path / "d" / MANIFEST
    file.write_text(file.read_text().replace("00000.tokens", name))
    with pytest.raises(DataError, match="no plain file name"):
        ShardDataset(tmp_path / "d")


def test_an_id_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="vocabulary of 10"),
        ShardWriter(tmp_path / "w", vocab_size=10, tokenizer="") as w,
    ):
        w.write(np.array([3, 10]), np.array([2]), 0)
    assert not (tmp_path / "w" / MANIFEST).exists()

    written(tmp_path / "d", TEXTS)  # ids up to 13
    file = tmp_path / "d" / MANIFEST
    file.write_text(file.read_text().replace('"vocab_size": 60000', '"vocab_size": 9'))
    dataset = ShardDataset(tmp_path / "d")
    with pytest.raises(DataError, match=r"00000\.tokens: token 11 is 9, expected an id below the vocabulary size 9"):
        dataset.verify()
    row = np.zeros(6, np.int64)
    dataset.read(0, row, row)
    with pytest.raises(DataError, match="token 11 is 9"):
        dataset.read(6, row, row)


def test_a_writer_that_fails_leaves_no_manifest(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, vocab_size=9, tokenizer="") as writer:
            writer.write(np.array([1, 2]), np.array([2]), 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / MANIFEST).exists()


def test_a_writer_does_not_mix_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "stray").touch()
    with pytest.raises(DataError, match="not empty"):
        ShardWriter(tmp_path, vocab_size=9, tokenizer="")


def test_the_fingerprint_is_the_content(tmp_path: Path) -> None:
    one, same, other = (
        written(tmp_path / "a", TEXTS),
        written(tmp_path / "b", TEXTS),
        written(tmp_path / "c", TEXTS[1:]),
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
