"""What is written when memory runs out, on an allocator snapshot of the form that PyTorch gives."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from treadle.memory.tracker import TrackMemory, report
from treadle.parallel.mesh import Mesh
from treadle.train.config import TrainingConfig
from treadle.train.loop import Loop
from treadle.train.optimizers import SGDConfig
from treadle.train.schedules import ConstantConfig
from treadle.train.state import TrainState

FRAMES = [
    {"filename": "/lib/torch/nn/functional.py", "line": 1, "name": "linear"},
    {"filename": "/home/me/treadle/nn/linear.py", "line": 42, "name": "forward"},
]


class Tiny(nn.Linear):
    roles = {"weight": "column"}
    device = torch.device("cpu")
    pipeline = None


class FakeRun:
    def __init__(self, folder: Path):
        self.folder = folder


def loop_with(callback: TrackMemory) -> Loop:
    model: Any = Tiny(4, 4, bias=False)
    state = TrainState(model, SGDConfig().build(model), torch.amp.GradScaler("cpu", enabled=False))
    training = TrainingConfig(steps=2, sequence_length=4, batch_size=1, compile=False)
    return Loop(state, training, ConstantConfig(), lambda *_: None, [callback], mesh=Mesh())  # type: ignore[arg-type]


def test_out_of_memory_leaves_a_report_and_goes_on_as_the_error(tmp_path: Path, monkeypatch: Any) -> None:
    tracker = TrackMemory(FakeRun(tmp_path))  # type: ignore[arg-type]
    tracker.plans = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setattr(
        "treadle.memory.tracker.cheapest",
        lambda _: [SimpleNamespace(overrides=lambda: ["training.micro_batch_size=1"])],
    )

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nlong advice")

    loop = loop_with(tracker)
    monkeypatch.setattr(loop, "_step", fails)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        loop.run([[]])
    (note,) = raised.value.__notes__
    path = tmp_path / "memory-step-1.txt"
    assert str(path) in note
    text = path.read_text()
    assert text.startswith("CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    assert "1. training.micro_batch_size=1" in text
    assert "long advice" not in text


def test_report_names_who_holds_what() -> None:
    weight = torch.empty(4)
    blocks = [
        {"state": "active_allocated", "address": weight.data_ptr(), "size": 3 * 2**30, "frames": FRAMES},
        {"state": "active_allocated", "address": 1, "size": 2**30, "frames": FRAMES},
        {"state": "active_allocated", "address": 2, "size": 2**30, "frames": FRAMES},
        {"state": "inactive", "address": 3, "size": 2**30, "frames": FRAMES},
    ]
    snapshot = {"segments": [{"total_size": 6 * 2**30, "blocks": blocks}]}
    lines = report(snapshot, [("parameters", "layers.0.mixer", weight)], "why", [])
    assert lines[0] == "why"
    assert "5.00 GiB in use, 6.00 GiB reserved" in lines[2]
    assert "3.000 GiB in    1  parameters of layers.0.mixer" in lines[3]
    assert "2.000 GiB in    2  forward (treadle/nn/linear.py:42)" in lines[4]
    assert len(lines) == 5


def test_a_signal_asks_for_a_snapshot_and_the_handler_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    tracker = TrackMemory(FakeRun(tmp_path))  # type: ignore[arg-type]
    loop = loop_with(tracker)
    tracker.start(loop)
    os.kill(os.getpid(), signal.SIGUSR1)
    tracker.step(loop, SimpleNamespace(step=2))  # type: ignore[arg-type]
    tracker.stop(loop)
    assert (tmp_path / "memory-step-1.txt").read_text().startswith("asked for\n")
    assert signal.getsignal(signal.SIGUSR1) is before
