"""Sources: every document once, in the same order, however it is cut; what cannot be read is named."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from treadle.data import records, sources
from treadle.data.sources import Piece, SourceConfig
from treadle.errors import DataError

DOCUMENTS = ["one", "zwei\n\nZeilen", "三", "x" * 50, "\ttab", " last "]


def source(kind: str, **options: object) -> SourceConfig:
    return SourceConfig.model_validate({"kind": kind, **options})


def test_a_text_file_is_a_document_and_globs_are_sorted(tmp_path: Path) -> None:
    for name, text in (("b.txt", "B"), ("a.txt", "A\r\n"), ("sub/c.md", "C"), ("empty.txt", ""), ("d.bin", "D")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert list(source("text", paths=str(tmp_path / "*.txt")).documents()) == ["A\r\n", "B"]
    assert list(source("text", paths=str(tmp_path)).documents()) == ["A\r\n", "B", "C"]
    assert list(source("text", paths=[str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]).documents()) == ["B", "A\r\n"]
    assert list(source("text", paths=str(tmp_path / "**/c.*")).documents()) == ["C"]


@given(
    documents=st.lists(
        st.text(st.characters(exclude_characters="#", codec="utf-8"), max_size=12), min_size=1, max_size=12
    ),
    separator=st.sampled_from(["\n\n", "\n", "#", "<|endoftext|>", "é#"]),
    piece=st.integers(1, 40),
    block=st.integers(1, 9),
)
def test_any_cut_gives_each_document_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], separator: str, piece: int, block: int
) -> None:
    text = separator.join(documents)
    file = tmp_path_factory.mktemp("text") / "t.txt"
    file.write_bytes(text.encode())
    if not text:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", piece)
        patch.setattr(records, "BLOCK", block)
        config = source("text", paths=str(file), separator=separator)
        found = [document for part in config.pieces() for document in config.read(part)]
        assert found == [part for part in text.split(separator) if part]
        assert separator != "#" or len(config.pieces()) == -(-len(text.encode()) // piece)


def jsonl(documents: list[str], key: str = "text") -> bytes:
    return "".join(
        json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(documents)
    ).encode()


def zst(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zst)])
def test_jsonl(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    # Two members in one file, as `cat a.gz b.gz` makes them.
    (tmp_path / f"d.jsonl{ending}").write_bytes(pack(jsonl(DOCUMENTS[:2])) + pack(b"\n" + jsonl(DOCUMENTS[2:])))
    whole = list(source("jsonl", paths=str(tmp_path)).documents())
    monkeypatch.setattr(sources, "PIECE_BYTES", 7)
    assert whole == list(source("jsonl", paths=str(tmp_path)).documents()) == DOCUMENTS


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zst)])
def test_a_compressed_file_cut_short_is_refused(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    whole = pack(jsonl([str(i) * 100 for i in range(50)]))
    file = tmp_path / f"d.jsonl{ending}"
    for size in range(1, len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be read"):
            list(source("jsonl", paths=str(file)).documents())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txt": "x"}', r"d\.jsonl:3: no field 'text'; the line has: txt\."),
        (b"[1]", r"d\.jsonl:3: no field 'text'; the line has: list\."),
        (b'{"text": null}', r"d\.jsonl:3: field 'text' is NoneType, expected a string"),
        (b'{"text": ', r"d\.jsonl:3: not a JSON line"),
        (b'{"text": "\xff"}', r"d\.jsonl:3: not a JSON line"),
        (b'{"text": "\\ud800"}', r"d\.jsonl:3: half a surrogate pair at character 0"),
    ],
)
@pytest.mark.parametrize("piece", [3, 1 << 20])
def test_a_bad_line_is_named(
    tmp_path: Path, line: bytes, message: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.jsonl").write_bytes(jsonl(DOCUMENTS[:2]) + line + b"\n")
    monkeypatch.setattr(sources, "PIECE_BYTES", piece)
    with pytest.raises(DataError, match=message):
        list(source("jsonl", paths=str(tmp_path / "d.jsonl")).documents())


@pytest.mark.parametrize("separator", [None, "\n", "#"])
def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, separator: str | None) -> None:
    (tmp_path / "t.txt").write_bytes("first\nzweite Zeile é\n#third ".encode() + "é".encode("latin1") + b" end\n")
    with pytest.raises(DataError, match=r"t\.txt:3: byte 0xe9 at offset 29 is not UTF-8; .*iconv"):
        list(source("text", paths=str(tmp_path / "t.txt"), separator=separator).documents())


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for kind in ("text", "jsonl", "parquet"):
        with pytest.raises(DataError, match=r"nothing\*.*no such file"):
            list(source(kind, paths=str(tmp_path / "nothing*")).documents())
    (tmp_path / "t.txt").touch()
    with pytest.raises(DataError, match="every document is empty"):
        list(source("text", paths=str(tmp_path / "t.txt")).documents())
    with pytest.raises(DataError, match="cannot be read"):
        list(source("text", paths="x").read(Piece(str(tmp_path / "gone.txt"))))
    with pytest.raises(DataError, match="cannot be read"):
        list(source("jsonl", paths="x").read(Piece(str(tmp_path / "gone.jsonl"))))


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    file = tmp_path / "d.parquet"
    parquet.write_table(arrow.table({"n": list(range(6)), "body": DOCUMENTS}), file, row_group_size=2)
    config = source("parquet", paths=str(tmp_path), column="body")
    assert list(config.documents()) == DOCUMENTS
    assert [list(config.read(piece)) for piece in config.pieces()] == [DOCUMENTS[:2], DOCUMENTS[2:4], DOCUMENTS[4:]]
    with pytest.raises(DataError, match="no column 'text'; it has: n, body"):
        list(source("parquet", paths=str(file)).documents())
    with pytest.raises(DataError, match="row 0 of row group 0, column 'n': int, expected a string"):
        list(source("parquet", paths=str(file), column="n").documents())
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"d\.parquet: cannot be read"):
            list(config.documents())


@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_reads_local_files(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "PIECE_BYTES", 40)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_bytes(jsonl(DOCUMENTS))
    config = source("huggingface", path=str(tmp_path / "data"), streaming=streaming)
    assert list(config.documents()) == DOCUMENTS
    assert streaming or len(config.pieces()) > 1
    before = config.signature()
    (tmp_path / "data/train.jsonl").write_bytes(jsonl(DOCUMENTS[:-1]))
    assert config.signature() != before
    with pytest.raises(DataError, match=r"split 'nonsense'\): cannot be loaded"):
        list(source("huggingface", path=str(tmp_path / "data"), split="nonsense").documents())
    with pytest.raises(DataError, match="no column 'body'; it has: id, text"):
        list(source("huggingface", path=str(tmp_path / "data"), field="body", streaming=streaming).documents())


def test_huggingface_reads_what_was_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    data = datasets.Dataset.from_dict({"text": DOCUMENTS})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"valid": data}).save_to_disk(str(tmp_path / "dict"))
    assert list(source("huggingface", path=str(tmp_path / "one")).documents()) == DOCUMENTS
    assert list(source("huggingface", path=str(tmp_path / "dict"), split="valid").documents()) == DOCUMENTS


def test_the_standard_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "pkg/m.py", "test/t.py", "site-packages/s.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert list(source("python_stdlib").documents()) == ["a.py", "b.py", "pkg/m.py", "test/t.py"]
    assert list(source("python_stdlib", tests=False).documents()) == ["a.py", "b.py", "pkg/m.py"]


def test_this_machine_has_a_standard_library() -> None:
    config = source("python_stdlib", tests=False)
    paths = [piece.path for piece in config.pieces()]
    assert any(path.endswith("/dataclasses.py") for path in paths)
    assert not any("site-packages" in path or "/test/" in path for path in paths)
    assert sum(piece.size for piece in config.pieces()) > 5_000_000


def test_the_signature_follows_the_files(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("one")
    config = source("text", paths=str(tmp_path))
    first = config.signature()
    assert first == config.signature() == source("text", paths=str(tmp_path), weight=3).signature()
    file.write_text("other")
    assert config.signature() != first != source("text", paths=str(tmp_path), separator="#").signature()


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "d.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"pyarrow is not installed.*pip install 'treadle\[data\]'"):
        list(source("jsonl", paths=str(tmp_path)).documents())


@pytest.mark.parametrize("paths", [None, 3, {"a": 1}, []])
def test_paths_have_to_be_paths(paths: object) -> None:
    with pytest.raises(ValidationError):
        source("text", paths=paths)


def test_records_of_a_stream_keep_their_offsets() -> None:
    found = list(records._records(io.BytesIO(b"ab,,c"), b",", 0, None))
    assert found == [(0, b"ab"), (3, b""), (4, b"c")]
