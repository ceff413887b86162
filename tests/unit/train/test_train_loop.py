"""The loop: its steps, clipping, precisions, what stops it."""

import copy
import itertools
import os
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from train_zoo import copied, gradients, make_loader, make_state, training_config

from treadle.errors import TrainingError
from treadle.train.forward_backward import forward_backward
from treadle.train.loop import Callback, Loop, StepRecord
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, MuonConfig, SGDConfig
from treadle.train.schedules import ConstantConfig, LinearConfig


class Recorder(Callback):
    """Remembers every call; may do something at each step."""

    def __init__(self, action: Callable[[Loop], None] | None = None):
        self.calls: list[str] = []
        self.records: list[StepRecord] = []
        self.action = action

    def start(self, loop):
        self.calls.append("start")

    def step(self, loop, record):
        assert loop.state.step == record.step
        self.calls.append("step")
        self.records.append(record)
        if self.action:
            self.action(loop)

    def stop(self, loop):
        self.calls.append("stop")


def make_loop(recorder, *, optimizer=None, schedule=None, rescue=None, state=None, **training):
    config = training_config(**training)
    state = state or make_state(config, optimizer)
    return Loop(state, config, schedule or ConstantConfig(), cross_entropy, [recorder], rescue=rescue)


def batches(loop, rows=4):
    loader = make_loader(loop.config.batch_size)
    step = loop.state.step
    while True:
        yield loader.micro_batches(step, rows)
        step += 1


def test_takes_exactly_the_steps_that_are_left():
    recorder = Recorder()
    loop = make_loop(recorder, steps=5)
    loop.run(batches(loop))
    assert recorder.calls == ["start", *["step"] * 5, "stop"]
    assert [record.step for record in recorder.records] == [1, 2, 3, 4, 5]
    assert loop.state.tokens == sum(record.tokens for record in recorder.records)
    again = make_loop(Recorder(), state=loop.state, steps=7)
    again.run(batches(again))
    assert [record.step for record in again.callbacks[0].records] == [6, 7]
    done = make_loop(Recorder(), state=loop.state, steps=7)
    done.run(batches(done))
    assert done.callbacks[0].calls == ["start", "stop"]


def test_the_schedule_sets_each_steps_rate():
    recorder = Recorder()
    loop = make_loop(recorder, steps=4, optimizer=AdamWConfig(lr=0.1), schedule=LinearConfig(warmup=2))
    loop.run(batches(loop))
    assert [record.lr for record in recorder.records] == pytest.approx([0.05, 0.1, 0.1, 0.05])


@pytest.mark.parametrize("limit", [0.01, 0.3, 1e9])
def test_clipping_is_pytorchs(limit):
    """One step of plain SGD at rate 1 moves the weights by exactly the clipped gradient."""
    plain = SGDConfig(lr=1.0, weight_decay=0.0, momentum=0.0)
    recorder = Recorder()
    loop = make_loop(recorder, optimizer=plain, clip_norm=limit, steps=1)
    model = copy.deepcopy(loop.state.model)
    before = copied(model)
    loop.run(batches(loop, rows=2))
    forward_backward(model, make_loader().micro_batches(0, 2), cross_entropy)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    assert recorder.records[0].grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(copied(loop.state.model)[name], before[name] - grad, rtol=0, atol=1e-7)


def test_no_clipping():
    loop = make_loop(Recorder(), optimizer=SGDConfig(lr=1.0, weight_decay=0.0, momentum=0.0), clip_norm=None, steps=1)
    model = copy.deepcopy(loop.state.model)
    before = copied(model)
    loop.run(batches(loop))
    forward_backward(model, make_loader().micro_batches(0, 4), cross_entropy)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(copied(loop.state.model)[name], before[name] - grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", [AdamWConfig(lr=1e-2), MuonConfig(lr=1e-2)], ids=lambda o: o.kind)
def test_the_loss_falls(precision, optimizer):
    recorder = Recorder()
    loop = make_loop(recorder, optimizer=optimizer, precision=precision, steps=40, batch_size=8)
    seen = []
    loop.state.model.layers["0"].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loop.run(batches(loop, rows=4))
    assert set(seen) == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert all(p.dtype == torch.float32 for p in loop.state.model.parameters())
    losses = [record.loss for record in recorder.records]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    # Unscaled gradients: all precisions report norms of one size.
    assert 0.01 < recorder.records[-1].grad_norm < 10


@pytest.mark.parametrize("optimizer", [AdamWConfig(), MuonConfig(), SGDConfig()], ids=lambda o: o.kind)
def test_fp16_overflow_skips_the_step_and_lowers_the_scale(optimizer):
    recorder = Recorder()
    loop = make_loop(recorder, optimizer=optimizer, precision="fp16", steps=60)
    loop.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    weights = [copied(loop.state.model)]
    recorder.action = lambda loop: weights.append(copied(loop.state.model))
    loop.run(batches(loop))
    scale = loop.state.scaler.get_scale()
    assert scale < 2.0**40
    skipped = [all(torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(weights)]
    assert skipped[0]
    assert not skipped[-1]
    assert sum(skipped) == round(torch.tensor(2.0**40 / scale).log2().item()), "each overflow halves the scale"
    assert all(torch.isfinite(value).all() for value in weights[-1].values())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("victim", ["layers.0.mixer.qkv.weight", "embedding.weight", "norm.weight"])
def test_fp16_overflow_in_one_parameter_holds_back_every_optimizer(poison, victim):
    loop = make_loop(Recorder(), optimizer=MuonConfig(), precision="fp16", steps=1)
    before = copied(loop.state.model)
    dict(loop.state.model.named_parameters())[victim].register_hook(lambda grad: torch.full_like(grad, poison))
    loop.run(batches(loop))
    after = copied(loop.state.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_the_weights_change(poison, tmp_path):
    def spoil(loop):
        if loop.state.step == 3:
            loop.state.model.norm.weight.data[0] = poison
            weights.update(copied(loop.state.model))

    weights: dict[str, torch.Tensor] = {}
    recorder = Recorder(spoil)
    loop = make_loop(recorder, steps=10, rescue=tmp_path)
    with pytest.raises(TrainingError, match=r"step 4: loss nan.*weights were not changed.*nonfinite-step-4\.pt"):
        loop.run(batches(loop, rows=2))
    assert recorder.calls == ["start", "step", "step", "step"]
    assert loop.state.step == 3
    torch.testing.assert_close(copied(loop.state.model), weights, rtol=0, atol=0, equal_nan=True)
    saved = torch.load(tmp_path / "nonfinite-step-4.pt")
    expected = make_loader().micro_batches(3, 2)
    assert len(saved) == 2
    for part, batch in zip(saved, expected, strict=True):
        assert torch.equal(part["tokens"], batch.tokens_BS)
        assert torch.equal(part["targets"], batch.targets_BS)
        assert torch.equal(part["samples"], batch.samples_B)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_non_finite_gradient_stops_too(precision):
    loop = make_loop(Recorder(), steps=2, precision=precision)
    before = copied(loop.state.model)
    loop.state.model.norm.weight.register_hook(lambda grad: grad / 0)
    with pytest.raises(TrainingError, match="gradient norm"):
        loop.run(batches(loop))
    assert all(torch.equal(before[name], value) for name, value in copied(loop.state.model).items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(loop):
        if loop.state.step == 2:
            os.kill(os.getpid(), number)

    recorder = Recorder(interrupt)
    loop = make_loop(recorder, steps=10)
    loop.run(batches(loop))
    assert loop.interrupted
    assert recorder.calls == ["start", "step", "step", "stop"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_interrupt_stops_at_once():
    def interrupt(loop):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    recorder = Recorder(interrupt)
    loop = make_loop(recorder, steps=10)
    with pytest.raises(KeyboardInterrupt):
        loop.run(batches(loop))
    assert "stop" not in recorder.calls


def test_runs_in_a_thread_of_its_own():
    recorder = Recorder()
    loop = make_loop(recorder, steps=2)
    thread = threading.Thread(target=lambda: loop.run(batches(loop)))
    thread.start()
    thread.join()
    assert len(recorder.records) == 2
