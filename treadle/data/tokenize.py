"""One source to token shards, by as many processes as there are cores.

The source is cut into tasks; each worker turns a task into small shards of its own, and these are joined in the order
of the source. So the result does not depend on the workers, and memory does not grow with the corpus.
"""

import hashlib
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from treadle.config.load import import_all
from treadle.data.shards import SHARD_TOKENS, TRAIN, VALIDATION, ShardDataset, ShardWriter
from treadle.data.sources import Piece, SourceConfig
from treadle.data.tokenizer import Tokenizer
from treadle.errors import DataError
from treadle.tracking.environment import cores

TASK_BYTES = 4 << 20
BATCH_CHARACTERS = 1 << 20
USER_MODULE = "treadle_user_"  # how the names of files begin that config/load.py imports by their path


@dataclass(frozen=True)
class Task:
    """Consecutive pieces of a source, and where their tokens go."""

    source: SourceConfig
    pieces: tuple[Piece, ...]
    held_out: float
    tokenizer: str
    folder: str

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def is_held_out(document: bytes, fraction: float) -> bool:
    """Whether a document is for validation. It depends on its content only, so copies of it are never on both sides."""
    return drawn(document, fraction)


def drawn(document: bytes, fraction: float, salt: bytes = b"") -> bool:
    """True for about `fraction` of all documents, by their content; another `salt` draws others."""
    if fraction == 0:
        return False
    digest = hashlib.blake2b(document, digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def tokenize(
    source: SourceConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    held_out: float,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
) -> None:
    """Write the documents of `source`, each ended by the end-of-text token, to folder/train and folder/validation.

    workers: processes; None: one per core that this process may use. Raises DataError. Ctrl-C stops the workers and
    is passed on.
    """
    parts = folder / "parts"
    tokenizer_folder = str(tokenizer.save(folder / "tokenizer"))
    tasks = [
        Task(source, pieces, held_out, tokenizer_folder, str(parts / f"{number:06d}"))
        for number, pieces in enumerate(grouped(source.pieces()))
    ]
    workers = min(workers or cores(), len(tasks))
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    folder / split,
                    vocab_size=tokenizer.vocab_size,
                    tokenizer=tokenizer.fingerprint,
                    shard_tokens=shard_tokens,
                )
            )
            for split in (TRAIN, VALIDATION)
        }
        shown = stack.enter_context(Shown(sum(task.size for task in tasks), progress))
        for task in finished(tasks, workers):
            counts = [join(Path(task.folder) / split, writer) for split, writer in writers.items()]
            shutil.rmtree(task.folder)
            shown.advance(task.size, sum(b for b, _ in counts), sum(t for _, t in counts))
    shutil.rmtree(parts, ignore_errors=True)


def grouped(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Neighbouring pieces together, up to `TASK_BYTES` or so."""
    group: list[Piece] = []
    for piece in pieces:
        group.append(piece)
        if sum(p.size for p in group) >= TASK_BYTES or len(group) == 1000:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def join(folder: Path, writer: ShardWriter) -> tuple[int, int]:
    """Append a folder of shards to a larger one. Bytes of text, and tokens."""
    dataset = ShardDataset(folder)
    for part in dataset.parts:
        writer.write(part.tokens, np.diff(part.offsets))
    writer.bytes += dataset.manifest.bytes
    return dataset.manifest.bytes, dataset.tokens


def run_task(task: Task, stopping: Event | None = None) -> None:
    """Tokenise the pieces of a task into its folder."""
    tokenizer = Tokenizer.load(task.tokenizer)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                ShardWriter(Path(task.folder) / split, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.fingerprint)
            )
            for split in (TRAIN, VALIDATION)
        ]
        for documents in batches(task):
            if stopping is not None and stopping.is_set():
                raise InterruptedError("tokenising was stopped")
            encoded = [document.encode() for document in documents]
            held = [is_held_out(document, task.held_out) for document in encoded]
            ids = tokenizer.encode_batch(documents)
            for split, writer in enumerate(writers):
                mine = [i for i in range(len(ids)) if held[i] == bool(split)]
                tokens = [np.array([*ids[i], tokenizer.eos_id], dtype=np.uint32) for i in mine]
                if tokens:
                    lengths = np.array([len(t) for t in tokens])
                    writer.write(np.concatenate(tokens), lengths, sum(len(encoded[i]) for i in mine))


def batches(task: Task) -> Iterator[list[str]]:
    """The documents of a task, about a megabyte at a time."""
    batch: list[str] = []
    characters = 0
    for piece in task.pieces:
        for document in task.source.read(piece):
            batch.append(document)
            characters += len(document)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def finished(tasks: Sequence[Task], workers: int) -> Iterator[Task]:
    """Run the tasks, and give each back once it and all before it are done."""
    if workers <= 1:
        for task in tasks:
            run_task(task)
            yield task
        return
    # Spawn: a forked child of a process with threads (PyTorch's, the tokenizer's) can hang.
    context = get_context("spawn")
    stopping = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(stopping,))
    try:
        sent = [(user_files(task.source), pickle.dumps(task)) for task in tasks]
        with _without_main():
            futures: list[Future[None]] = [pool.submit(_run_in_worker, *each) for each in sent]
        for task, future in zip(tasks, futures, strict=True):
            future.result()
            yield task
    except BrokenProcessPool as error:
        raise DataError(
            f"a tokenising process was killed, probably for want of memory; set data.workers below {workers}"
        ) from error
    finally:
        stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not run the user's script again.

    A spawned process imports the script of its parent. Without `if __name__ == "__main__":` it would train as well, and
    wait forever for the preparation that waits for it. The workers need nothing of the script.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_stopping: Event | None = None  # of a worker process, set as it begins


def _begin_worker(stopping: Event) -> None:
    global _stopping
    _stopping = stopping
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and stops the workers in order
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def user_files(source: SourceConfig) -> list[str]:
    """The files that a recipe imports by their path and that define `source`: no other process finds them by name."""
    modules = [sys.modules.get(kind.__module__) for kind in type(source).__mro__]
    return [str(module.__file__) for module in modules if module and module.__name__.startswith(USER_MODULE)]


def _run_in_worker(files: Sequence[str], pickled: bytes) -> None:
    # Unpickled here and not on the way, where an error would end the process without a word.
    import_all(files, "tokenising")
    try:
        task: Task = pickle.loads(pickled)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"a tokenising process cannot import the source's class: {error}; define it in a file or module that the "
            f"recipe's `imports` name, or set data.workers: 1"
        ) from error
    run_task(task, _stopping)


class Shown:
    """The progress line, on the terminal: share done, MB/s of text, tokens/s."""

    def __init__(self, total: int, enabled: bool):
        self._progress = Progress(
            TextColumn("tokenise"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not enabled,
        )
        self._task = self._progress.add_task("tokenise", total=max(total, 1), rates="")
        self._bytes = self._tokens = 0

    def advance(self, size: int, text_bytes: int, tokens: int) -> None:
        self._bytes += text_bytes
        self._tokens += tokens
        elapsed = max(self._progress.tasks[self._task].elapsed or 0, 1e-9)
        rates = f"{self._bytes / elapsed / 1e6:.1f} MB/s, {self._tokens / elapsed / 1e6:.2f} M tokens/s"
        self._progress.update(self._task, advance=size, rates=rates)

    def __enter__(self) -> "Shown":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
