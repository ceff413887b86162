"""How fast data gets to the model: packing and loading from memory-mapped shards, and tokenising, on one core.

    python benchmarks/data.py

Packing and loading is `Loader.batch`: choosing rows, reading them, targets, and the attention context. The shards hold
random tokens in documents of 20 to 1,600 (mean 810), and lie in the page cache. Text is the Python standard library's.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from treadle.data.loader import Loader
from treadle.data.ngram import NgramModel
from treadle.data.shards import ShardDataset, ShardWriter
from treadle.data.sources import PythonStdlibConfig
from treadle.data.tokenizer import BytesTokenizerConfig, TrainTokenizerConfig

REPEATS = 9
SEQUENCE, ROWS, STEPS = 8192, 8, 40
TOKENS = 50_000_000


def random_shards(folder: Path) -> ShardDataset:
    """Shards of random documents, read once so that they are in the page cache."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, vocab_size=50_000, tokenizer="random", shard_tokens=1 << 24) as writer:
        written = 0
        while written < TOKENS:
            lengths = rng.integers(20, 1600, 5000)
            writer.write(rng.integers(0, 50_000, lengths.sum(), dtype=np.uint32), lengths)
            written += int(lengths.sum())
    dataset = ShardDataset(folder)
    dataset.verify()
    return dataset


def measured(work: Callable[[], object], amount: float, repeats: int = REPEATS) -> list[float]:
    """amount / wall seconds, of each repetition after a first one that does not count."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        rates.append(amount / (time.perf_counter() - start))
    return rates


def loading(dataset: ShardDataset, isolate: bool) -> list[float]:
    loader = Loader([dataset], sequence_length=SEQUENCE, batch_size=ROWS, isolate_documents=isolate)
    step = iter(range(10**9))
    return measured(lambda: [loader.batch(next(step)) for _ in range(STEPS)], SEQUENCE * ROWS * STEPS / 1e6)


def main() -> None:
    torch.set_num_threads(1)
    documents = list(PythonStdlibConfig(tests=False).documents())
    some = documents[::4]
    size = sum(len(text.encode()) for text in some) / 1e6
    encoded = [text.encode() for text in documents]
    rows: list[tuple[str, str, list[float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = random_shards(Path(folder) / "shards")
        for isolate in (True, False):
            name = f"pack and load, sequence {SEQUENCE}, isolate_documents={str(isolate).lower()}"
            rows.append((name, "M tokens/s", loading(dataset, isolate)))
        del dataset
    trained = TrainTokenizerConfig(vocab_size=4096).build(some)
    rows.append(("tokenise, byte-level BPE of 4,096", "MB/s", measured(lambda: trained.encode_batch(some), size, 3)))
    plain = BytesTokenizerConfig().build()
    rows.append(("tokenise, bytes", "MB/s", measured(lambda: plain.encode_batch(some), size, 3)))
    counted = sum(map(len, encoded)) / 1e6
    rows.append(("count byte 5-grams", "MB/s", measured(lambda: NgramModel(encoded, 5), counted, 3)))

    console = Console()
    console.print(f"{processor()}, one core; Python {platform.python_version()}, torch {torch.__version__}")
    console.print("python benchmarks/data.py")
    table = Table("what", "unit", "median", "lowest", "highest")
    for name, unit, rates in rows:
        table.add_row(name, unit, *(f"{rate:.1f}" for rate in (statistics.median(rates), min(rates), max(rates))))
    console.print(table)


def processor() -> str:
    """The processor's name, from Linux if it says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
