"""Speed, MFU and FLOPs, by arithmetic on known times."""

import time

import pytest
import torch
from train_zoo import LENGTH, VOCABULARY, make_loader, make_state, spec, training_config

from treadle.nn.flops import forward_flops, parameter_count, training_flops
from treadle.nn.transformer import Transformer
from treadle.train import callbacks
from treadle.train.callbacks import Every, Metrics
from treadle.train.hardware import peak_flops
from treadle.train.loop import Callback, Loop, StepRecord
from treadle.train.losses import cross_entropy
from treadle.train.schedules import ConstantConfig
from treadle.train.timing import Stopwatch


class Log:
    """The part of a run that metrics are told to."""

    def __init__(self):
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, step, metrics, kind="train"):
        self.logged.append((step, dict(metrics)))


class FixedWatch(Stopwatch):
    """Says that every step took 1/4 s of forward and 3/4 s of backward."""

    def __init__(self):
        super().__init__("cpu")
        self.steps = 0

    def read(self):
        steps, self.steps = self.steps, 0
        return {"forward": 0.25 * steps, "backward": 0.75 * steps}


class Count(Callback):
    def __init__(self, watch):
        self.watch, self.records = watch, []

    def step(self, loop, record):
        self.watch.steps += 1
        self.records.append(record)


def run(steps, every, monkeypatch=None, peak=None, stop_at=None):
    if peak is not None:
        monkeypatch.setattr(callbacks, "peak_flops", lambda device: peak)
    config, log = training_config(steps=steps), Log()
    metrics = Metrics(log, every, positions_per_step=4 * LENGTH, length=10.0)  # type: ignore[arg-type]
    state, watch = make_state(config), FixedWatch()
    count = Count(watch)
    loop = Loop(state, config, ConstantConfig(), cross_entropy, [count, metrics])
    loop.watch = watch
    if stop_at is not None:

        class Stop(Callback):
            def step(self, loop, record):
                loop.interrupted = record.step == stop_at

        loop.callbacks.append(Stop())
    loader = make_loader()
    loop.run([loader.batch(step)] for step in range(steps))
    return log.logged, count.records, state


def test_a_window_is_a_mean_over_its_steps():
    logged, records, state = run(steps=7, every=3)
    assert [step for step, _ in logged] == [3, 6, 7]
    for (step, metrics), window in zip(logged, (records[:3], records[3:6], records[6:]), strict=True):
        tokens = sum(r.tokens for r in window)
        assert metrics["loss"] == pytest.approx(sum(r.loss * r.tokens for r in window) / tokens)
        assert metrics["grad_norm"] == pytest.approx(sum(r.grad_norm for r in window) / len(window))
        assert metrics["tokens"] == sum(r.tokens for r in records[:step])
        assert all(r.seconds > 0 for r in window)
        assert metrics["tokens_per_second"] == pytest.approx(len(window) * 4 * LENGTH / sum(r.seconds for r in window))
        assert metrics["forward_seconds"] == pytest.approx(0.25)
        assert metrics["backward_seconds"] == pytest.approx(0.75)
        assert "mfu" not in metrics
    assert state.flops == pytest.approx(7 * 4 * LENGTH * training_flops(state.model, 10.0))


def test_mfu_is_the_share_of_the_peak(monkeypatch):
    logged, records, state = run(steps=4, every=2, monkeypatch=monkeypatch, peak=1e9)
    flops = 2 * training_flops(state.model, 10.0) * 4 * LENGTH
    seconds = [records[0].seconds + records[1].seconds, records[2].seconds + records[3].seconds]
    assert [metrics["mfu"] for _, metrics in logged] == pytest.approx([flops / s / 1e9 for s in seconds])


def test_an_interrupted_window_is_logged_too():
    logged, _, _ = run(steps=10, every=4, stop_at=6)
    assert [step for step, _ in logged] == [4, 6]


def test_flops_by_hand():
    """2 FLOPs per weight of every matmul and token, and causal attention: 4 * heads * head_dim * length / 2."""
    model: Transformer = spec().build()
    qkv, out, gate_up, down = 32 * (32 + 16 + 16), 32 * 32, 32 * 128, 64 * 32
    matmuls = 2 * (qkv + out + gate_up + down) + VOCABULARY * 32
    attention = 2 * (4 * 2 * 16 * 10 / 2)
    assert forward_flops(model, 10) == 2 * matmuls + attention
    assert training_flops(model, 10) == 3 * (2 * matmuls + attention)
    norms = 2 * 2 * 32 + 32
    assert parameter_count(model) == matmuls + VOCABULARY * 32 + norms
    tied: Transformer = spec(tied=True).build()
    assert forward_flops(tied, 10) == forward_flops(model, 10), "a tied head computes as much as one of its own"
    assert parameter_count(tied) == parameter_count(model) - VOCABULARY * 32


def test_flops_are_those_that_pytorch_counts():
    """Attention aside, which PyTorch counts whole and we by its causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    model: Transformer = spec().build().initialise(0)
    batch = make_loader(isolate_documents=False).batch(0)
    with FlopCounterMode(display=False) as counter:
        model(batch.tokens_BS, batch.context)
    counts = {str(op): value for op, value in counter.get_flop_counts()["Global"].items()}
    counted = sum(value for op, value in counts.items() if "mm" in op)
    assert counted == batch.tokens_BS.numel() * forward_flops(model, 0)


def test_peaks(monkeypatch):
    def peak(name):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
        return peak_flops(torch.device("cuda"))

    assert peak("NVIDIA H200") == 989.4e12
    assert peak("NVIDIA GB200") == 2500e12
    assert peak("NVIDIA B200") == 2250e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA H100 PCIe") is None
    assert peak("NVIDIA H100 NVL") is None
    assert peak("Some Other GPU") is None
    assert peak_flops(torch.device("cpu")) is None


def test_stopwatch_adds_up_phases_and_starts_again():
    watch = Stopwatch("cpu")
    for _ in range(2):
        with watch("a"):
            time.sleep(0.01)
    with watch("b", host=True):
        pass
    seconds = watch.read()
    assert seconds.keys() == {"a", "b"}
    assert 0.02 <= seconds["a"] < 0.5
    assert 0 <= seconds["b"] < 0.01
    assert watch.read() == {}


def test_every_calls_at_multiples_and_at_the_end():
    config = training_config(steps=7)
    loop = Loop(make_state(config), config, ConstantConfig(), cross_entropy)
    for every, expected in ((3, [3, 6, 7]), (7, [7]), (None, [7])):
        called: list[int] = []
        callback = Every(every, called.append)
        for step in range(1, 8):
            callback.step(loop, StepRecord(step, 1.0, 1.0, 1.0, 1))
        assert called == expected
