"""A tiny pretraining recipe, and real processes that run the command line on it.

The processes are forked from one that has imported everything, so that each starts at once.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

SERVER = """
import json, os, resource, signal, sys, traceback
import matplotlib.pyplot, treadle.api, treadle.recipes.pretrain
import treadle.cli, treadle.cli.train, treadle.cli.generate
import torch.distributed.checkpoint.state_dict_saver

def child(order):
    os.setpgid(0, 0)
    os.chdir(order["folder"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1); os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if order["largest_file"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"],) * 2)
    sys.argv = ["treadle", *order["arguments"]]
    try:
        treadle.cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        status = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        print(status, flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        child(order)
    print(pid, flush=True)
"""

TEXT_SEPARATOR = "\n%\n"


class Process:
    """A command that runs. `output` is what it has printed until now."""

    def __init__(self, launcher: "Launcher", pid: int, output: Path):
        self.launcher, self.pid, self._output = launcher, pid, output
        self.code: int | None = None

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def send(self, number: int) -> None:
        os.kill(self.pid, number)  # it exists until it is waited for, if only as a zombie

    def wait(self) -> int:
        """The exit code; negative for the signal that killed it."""
        if self.code is None:
            self.code = int(self.launcher.ask({"wait": self.pid}))
        return self.code


class Launcher:
    """Starts `treadle` commands in a folder."""

    def __init__(self) -> None:
        quick = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quick
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        self._count = 0

    def ask(self, order: dict[str, Any]) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline()

    def start(self, folder: Path, *arguments: Any, largest_file: int | None = None) -> Process:
        """largest_file: bytes that no file of the process may exceed, as on a full disk."""
        self._count += 1
        output = folder / f"output-{self._count}.txt"
        order = {
            "folder": str(folder),
            "output": str(output),
            "arguments": [str(a) for a in arguments],
            "largest_file": largest_file,
        }
        return Process(self, int(self.ask(order)), output)

    def run(self, folder: Path, *arguments: Any, code: int = 0, **options: Any) -> str:
        """The output of a command that ends by itself, with this exit code."""
        process = self.start(folder, *arguments, **options)
        assert process.wait() == code, process.output
        return process.output

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def recipe(**changes: Any) -> dict[str, Any]:
    """A model of width 32 on a few KB of text."""
    layer = {
        "kind": "pre_norm",
        "repeat": 2,
        "mixer": {"kind": "attention", "heads": 2, "kv_heads": 1},
        "feedforward": {"kind": "gated", "dim": 64},
    }
    plain = {
        "recipe": "pretrain",
        "name": "tiny",
        "device": "cpu",
        "model": {"dim": 32, "max_length": 64, "layers": [layer]},
        "data": {
            "sources": [{"kind": "text", "paths": "corpus.txt", "separator": TEXT_SEPARATOR}],
            "tokenizer": "bytes",
            "held_out": 0.1,
            "workers": 1,
        },
        "training": {
            "steps": 4,
            "sequence_length": 32,
            "batch_size": 4,
            "precision": "fp32",
            "compile": False,
            "log_every": 1,
        },
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "checkpoint": {"every": 2},
        "sample": {"max_new_tokens": 8},
    }
    return {**plain, **changes}


def corpus(documents: int = 60, seed: int = 0) -> str:
    generator = random.Random(seed)
    text = "the cat sat on a mat and my dog ran over that hill in warm sun grüße 日本"
    words = text.split()
    return TEXT_SEPARATOR.join(" ".join(generator.choices(words, k=generator.randint(5, 40))) for _ in range(documents))


def write_workplace(folder: Path, text: str | None = None, **changes: Any) -> Path:
    """corpus.txt and recipe.yaml in `folder`; the recipe."""
    (folder / "corpus.txt").write_text(corpus() if text is None else text)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(**changes)))
    return path


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What was logged, in the order of writing; a torn line is none."""
    found = []
    file = run / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == kind:
            found.append(record)
    return found


def status(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "status.json").read_text())
    return result


def wait_for_steps(process: Process, run: Path, count: int, seconds: float = 60) -> bool:
    """Whether `count` records are there before the process ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if len(records(run)) >= count:
            return True
        if has_ended(process):
            return False
        time.sleep(0.001)
    process.send(signal.SIGKILL)
    raise AssertionError(f"not {count} steps in {seconds} s: {process.output}")


def has_ended(process: Process) -> bool:
    """Ended, though nobody has waited for it yet."""
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"
