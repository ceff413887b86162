"""Preparing text: the same result for any number of workers, found again in the cache, never half of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from data_zoo import die

from treadle.config.load import import_all
from treadle.data import tokenize
from treadle.data.cache import build_once
from treadle.data.config import DataConfig
from treadle.data.prepare import Prepared, prepare
from treadle.data.shards import ShardDataset
from treadle.data.tokenizer import Tokenizer
from treadle.errors import DataError

TEXTS = [f"document {i}: " + "word " * (i % 7) + "é" * (i % 3) for i in range(400)]


def config(folder: Path, **changes: object) -> DataConfig:
    source = {"kind": "text", "paths": str(folder / "*.txt"), "separator": "\n##\n"}
    return DataConfig.model_validate(
        {"sources": [source], "tokenizer": "bytes", "held_out": 0.2, "workers": 1} | changes
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """400 documents in ten files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text("\n##\n".join(TEXTS[40 * i : 40 * i + 40]))
    return folder


def texts(dataset: object, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(document[:-1].tolist()) for document in dataset.each_document()]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_document_is_on_one_side_in_order(corpus: Path, tmp_path: Path) -> None:
    data = prepare(config(corpus), tmp_path / "cache", progress=False)
    (train,), (held,) = data.train, data.validation.values()
    sides = texts(train, data.tokenizer), texts(held, data.tokenizer)
    assert sorted(sides[0] + sides[1]) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(sides[0])] == sides[0]
    assert [text for text in TEXTS if text in set(sides[1])] == sides[1]
    assert 0.12 < len(sides[1]) / len(TEXTS) < 0.28
    for dataset, side in ((train, sides[0]), (held, sides[1])):
        assert dataset.bytes == sum(len(text.encode()) for text in side)
        assert dataset.tokens == dataset.bytes + dataset.documents
        assert all(document[-1] == data.tokenizer.eos_id for document in dataset.each_document())
        dataset.verify()


def test_copies_of_a_document_are_on_the_same_side(corpus: Path, tmp_path: Path) -> None:
    (corpus / "a.txt").write_text("\n##\n".join(TEXTS))
    data = prepare(config(corpus), tmp_path / "cache", progress=False)
    train, held = (set(texts(d, data.tokenizer)) for d in (data.train[0], data.validation["text"]))
    assert not train & held


def test_the_number_of_workers_and_tasks_does_not_matter(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(config(corpus), tmp_path / "one", progress=False)
    monkeypatch.setattr(tokenize, "TASK_BYTES", 3000)
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 100)
    for workers in (1, 3):
        cut = prepare(config(corpus, workers=workers), tmp_path / str(workers), progress=False)
        assert content(cut.folders[0]) == content(whole.folders[0])


def test_the_second_call_returns_what_is_there(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {"kind": "train", "vocab_size": 290}
    first = prepare(config(corpus, tokenizer=trained), tmp_path / "cache", progress=False)
    monkeypatch.setattr(tokenize, "run_task", None)  # nothing may be tokenised, or learned, again
    monkeypatch.setattr("treadle.data.tokenizer.TrainTokenizerConfig.build", None)
    again = prepare(config(corpus, tokenizer=trained, workers=2), tmp_path / "cache", progress=False)
    assert again.folders == first.folders
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert {path.name for path in (tmp_path / "cache/tokens").iterdir() if path.is_dir()} == {first.folders[0].name}


def test_anything_that_changes_the_tokens_changes_the_folder(corpus: Path, tmp_path: Path) -> None:
    def folder(**changes: object) -> Path:
        return prepare(config(corpus, **changes), tmp_path / "cache", progress=False).folders[0]

    bytes_and_more = {"kind": "bytes", "special_tokens": ["<|endoftext|>", "<|user|>"]}
    folders = [folder(), folder(held_out=0.3), folder(tokenizer=bytes_and_more)]
    os.utime(corpus / "3.txt", (1, 1))
    folders.append(folder())
    assert len(set(folders)) == 4
    assert content(folders[0]) == content(folders[3])


def test_a_tokenizer_learns_nothing_from_held_out_text(corpus: Path, tmp_path: Path) -> None:
    trained = {"kind": "train", "vocab_size": 290}
    data = prepare(config(corpus, tokenizer=trained), tmp_path / "cache", progress=False)
    only_train = DataConfig.model_validate({"sources": ["python_stdlib"], "tokenizer": trained}).tokenizer
    assert only_train.build(texts(data.train[0], data.tokenizer)).fingerprint == data.tokenizer.fingerprint


def test_each_source_is_a_dataset_with_its_weight(corpus: Path, tmp_path: Path) -> None:
    (corpus / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:100]))
    sources = [
        {"kind": "text", "paths": str(corpus / "0.txt"), "separator": "\n##\n", "weight": 3},
        {"kind": "text", "paths": str(corpus / "1.txt"), "separator": "\n##\n", "weight": 1},
        {"kind": "jsonl", "paths": str(corpus / "more.jsonl"), "weight": 2},
    ]
    data = prepare(config(corpus, sources=sources), tmp_path / "cache", progress=False)
    assert data.weights == (3, 1, 2)
    assert [d.documents + v.documents for d, v in zip(data.train, data.validation.values(), strict=True)] == [
        40,
        40,
        100,
    ]
    assert list(data.validation) == ["text-0", "text-1", "jsonl"]
    unweighted = [{key: value for key, value in source.items() if key != "weight"} for source in sources]
    by_size = prepare(config(corpus, sources=unweighted), tmp_path / "cache", progress=False)
    assert by_size.folders == data.folders
    assert by_size.weights == tuple(float(d.tokens) for d in data.train)


def test_prepared_folders_are_datasets_of_another_recipe(corpus: Path, tmp_path: Path) -> None:
    first = prepare(config(corpus), tmp_path / "cache", progress=False)
    (folder,) = first.folders

    def opened(path: Path, **changes: object) -> Prepared:
        return prepare(DataConfig.model_validate({"datasets": [{"kind": "shards", "path": path}]} | changes))

    again = opened(folder)
    assert again.train[0].fingerprint == first.train[0].fingerprint
    assert again.validation[folder.name].fingerprint == first.validation["text"].fingerprint
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert not opened(folder / "train", tokenizer="bytes").validation
    with pytest.raises(DataError, match="made with tokenizer"):
        opened(folder, tokenizer={"kind": "bytes", "reserved": 1})


def test_too_few_documents_for_both_sides_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one text")
    one = {"kind": "text", "paths": str(tmp_path / "t.txt")}
    with pytest.raises(DataError, match=r"held_out: 1e-05 of 1 documents.*`separator`"):
        prepare(config(tmp_path, sources=[one], held_out=1e-5), tmp_path / "cache", progress=False)
    with pytest.raises(DataError, match=r"no document to train on; .*lower held_out=0\.99"):
        prepare(config(tmp_path, sources=[one], held_out=0.99999), tmp_path / "cache", progress=False)
    data = prepare(config(tmp_path, sources=[one], held_out=0), tmp_path / "cache", progress=False)
    assert (data.train[0].documents, data.validation) == (1, {})


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_ours_and_leaves_nothing(
    corpus: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "TASK_BYTES", 3000)
    whole = (corpus / "7.txt").read_bytes()
    (corpus / "7.txt").write_bytes(whole + b"\xff")
    with pytest.raises(DataError, match=r"7\.txt:79: byte 0xff"):
        prepare(config(corpus, workers=workers), tmp_path / "cache", progress=False)
    assert [path for path in (tmp_path / "cache/tokens").iterdir() if path.is_dir()] == []


def test_a_file_that_changes_meanwhile_is_noticed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_task(task: tokenize.Task) -> None:
        original(task)
        (corpus / "5.txt").write_text("other")

    original = tokenize.run_task
    monkeypatch.setattr(tokenize, "run_task", run_task)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(config(corpus), tmp_path / "cache", progress=False)


PROGRAM = """
import signal
import sys
from treadle.data.config import DataConfig
from treadle.data.prepare import prepare
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    prepare(DataConfig.model_validate_json(sys.argv[1]), progress=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_preparation_is_never_taken_for_whole(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    rng = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / f"{i}.txt").write_bytes(rng.integers(97, 123, 5_000_000, dtype=np.uint8).tobytes())
    source = {"kind": "text", "paths": str(tmp_path / "*.txt")}
    settings = config(tmp_path, sources=[source], held_out=0, workers=2, cache=tmp_path / "cache")
    command = [sys.executable, str(tmp_path / "program.py"), settings.model_dump_json()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/tokens/*.partial/parts/*/train/*.tokens")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert psutil.wait_procs(workers, timeout=20)[1] == []  # they do not outlive it

    folders = [path for path in (tmp_path / "cache/tokens").iterdir() if path.is_dir()]
    assert all(path.name.endswith(".partial") for path in folders)
    assert how == signal.SIGKILL or not folders
    for manifest in tmp_path.glob("cache/tokens/*.partial/train/manifest.json"):
        pytest.fail(f"{manifest} makes half of the data look whole")

    data = prepare(settings, progress=False)
    assert (data.train[0].documents, data.train[0].bytes) == (12, 60_000_000)
    data.train[0].verify()
    assert not list(tmp_path.glob("cache/tokens/*.partial"))


def test_who_comes_second_waits_for_the_first(tmp_path: Path) -> None:
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(1)
        time.sleep(0.2)
        (folder / "whole").touch()

    def ask() -> None:
        assert (build_once(tmp_path / "thing", make) / "whole").exists()

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing", "thing.lock"]


def test_a_worker_that_dies_is_a_clear_error(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "TASK_BYTES", 3000)
    monkeypatch.setattr(tokenize, "_run_in_worker", die)
    with pytest.raises(DataError, match=r"was killed.*set data\.workers below 2"):
        prepare(config(corpus, workers=2), tmp_path / "cache", progress=False)


def test_shards_are_joined_within_their_limit(corpus: Path, tmp_path: Path) -> None:
    settings = config(corpus)
    source, tokenizer = settings.sources[0], settings.tokenizer.build()
    tokenize.tokenize(source, tokenizer, tmp_path / "t", held_out=0, workers=1, shard_tokens=1000, progress=False)
    dataset = ShardDataset(tmp_path / "t/train")
    assert texts(dataset, tokenizer) == TEXTS
    assert len(dataset.parts) > 5
    assert max(len(part.tokens) for part in dataset.parts) <= 1000


def test_a_script_without_a_main_guard_prepares_once(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"document {number} " * 400_000)
    script = tmp_path / "script.py"
    script.write_text(
        "from treadle.config import resolve\nfrom treadle.data.config import DataConfig\n"
        "from treadle.data.prepare import prepare\n"
        "source = {'sources': [{'kind': 'text', 'paths': ['corpus/*.txt']}], 'tokenizer': 'bytes', 'held_out': 0}\n"
        "config = resolve(DataConfig, {**source, 'workers': 2})\n"
        "print('tokens', prepare(config, 'cache', progress=False).train[0].tokens)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["tokens", str(3 * (11 * 400_000 + 1))], done.stderr


KIND = """
from typing import Literal
from treadle.data.sources import Piece, SourceConfig

class CountedConfig(SourceConfig):
    kind: Literal["counted_{name}"] = "counted_{name}"

    def pieces(self):
        return [Piece(str(i), size=5 << 20) for i in range(4)]

    def read(self, piece):
        yield f"document {{piece.path}}"
"""


@pytest.mark.parametrize("how", ["file", "module"])
def test_workers_find_a_source_of_the_users_own(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module, where it was imported as a file, has a name that no other process could import."""
    (tmp_path / f"counted_{how}.py").write_text(KIND.format(name=how))
    monkeypatch.syspath_prepend(str(tmp_path))
    import_all([str(tmp_path / "counted_file.py") if how == "file" else "counted_module"], "test")
    data = prepare(config(tmp_path, sources=[f"counted_{how}"], held_out=0, workers=2), tmp_path / "c", progress=False)
    assert texts(data.train[0], data.tokenizer) == [f"document {i}" for i in range(4)]


def test_a_source_that_workers_cannot_import_is_a_clear_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        KIND.format(name="here") + "from treadle.data.config import DataConfig\n"
        "from treadle.data.prepare import prepare\n"
        "data = {'sources': ['counted_here'], 'tokenizer': 'bytes', 'held_out': 0, 'workers': 2}\n"
        "prepare(DataConfig.model_validate(data), 'cache', progress=False)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "cannot import the source's class" in done.stderr
    assert "set data.workers: 1" in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_workers_are_as_many_as_the_cores_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert tokenize.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert tokenize.cores() == len(before)


def test_a_cache_that_cannot_be_written_is_a_clear_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", Path("/proc/treadle")):
        with pytest.raises(DataError, match=rf"cache folder {cache}/tokens: cannot be written: .*set data\.cache"):
            prepare(config(corpus), cache, progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_a_clear_error(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache/tokens"
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written: Permission denied"):
        prepare(config(corpus), tmp_path / "cache", progress=False)
