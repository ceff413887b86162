"""Checkpoints: whole or not there, kept by a policy, loaded exactly or refused with a reason."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from train_zoo import copied, make_loader, make_state, training_config

from treadle.errors import CheckpointError
from treadle.train.callbacks import SaveCheckpoints
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig
from treadle.train.loop import Callback, Loop
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, MuonConfig, SGDConfig
from treadle.train.schedules import ConstantConfig

OPTIMIZERS = [AdamWConfig(lr=0.01), MuonConfig(lr=0.01), SGDConfig(lr=0.1), SGDConfig(lr=0.1, momentum=0.0)]


def checkpointer(folder: Path, **config) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig(**config))


def trained(steps: int, state=None, optimizer=None, callbacks=(), **training):
    """A state after `steps` steps of the same data, and the losses of the steps taken here."""
    config = training_config(steps=steps, **training)
    state = state or make_state(config, optimizer)
    losses = []

    class Record(Callback):
        def step(self, loop, record):
            losses.append(record.loss)

    loader = make_loader()
    loop = Loop(state, config, ConstantConfig(), cross_entropy, [Record(), *callbacks])
    loop.run(loader.micro_batches(step, 2) for step in range(state.step, steps))
    return state, losses


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o.kind)
def test_going_on_from_a_checkpoint_is_exact(tmp_path, optimizer, asynchronous, precision):
    _, expected = trained(8, optimizer=optimizer, precision=precision)
    state, losses = trained(4, optimizer=optimizer, precision=precision)
    saver = checkpointer(tmp_path, asynchronous=asynchronous)
    saver.save(state, {"mine": [1, 2]}, wait=True)
    fresh = make_state(training_config(precision=precision), optimizer)
    for parameter in fresh.model.parameters():
        parameter.data.fill_(7.0)  # nothing of the start may survive
    loader = checkpointer(tmp_path)
    assert loader.facts(4)["mine"] == [1, 2]
    loader.load(fresh, 4)
    assert (fresh.step, fresh.tokens) == (4, state.tokens)
    _, rest = trained(8, fresh, precision=precision)
    assert losses + rest == expected


def test_a_background_save_is_of_the_moment_it_began(tmp_path):
    state, _ = trained(2)
    before = copied(state.model)
    saver = checkpointer(tmp_path)
    saver.save(state, {})
    for parameter in state.model.parameters():
        parameter.data.fill_(7.0)
    for moments in state.optimizers.optimizers[0].state.values():
        moments["exp_avg"].fill_(7.0)
    saver.finish()
    checkpointer(tmp_path).load(state, 2)
    torch.testing.assert_close(copied(state.model), before, rtol=0, atol=0)
    assert not any((moments["exp_avg"] == 7).any() for moments in state.optimizers.optimizers[0].state.values())


def test_the_random_numbers_go_on(tmp_path):
    state, _ = trained(1)
    torch.manual_seed(3)
    checkpointer(tmp_path).save(state, {}, wait=True)
    expected = torch.rand(4)
    torch.manual_seed(4)
    checkpointer(tmp_path).load(state, 1)
    assert torch.equal(torch.rand(4), expected)


def test_a_torn_checkpoint_is_never_picked_up(tmp_path):
    state, _ = trained(2)
    saver = checkpointer(tmp_path)
    saver.save(state, {}, wait=True)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000004.partial")  # killed before the renaming
    (tmp_path / "step-00000003").mkdir()  # no checkpoint.json
    (tmp_path / "step-00000003" / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-00000005").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert saver.steps() == []
    assert checkpointer(tmp_path / "nowhere").steps() == []
    saver.save(state, {}, wait=True)
    assert saver.steps() == [2]
    assert not list(tmp_path.glob(".*")), "the remains of a killed process are cleared away"


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (1, None, [9]),
        (3, None, [7, 8, 9]),
        (1, 4, [4, 8, 9]),
        (2, 3, [3, 6, 8, 9]),
        (20, None, [*range(1, 10)]),
    ],
)
def test_retention(tmp_path, keep, keep_every, left):
    state = make_state(training_config())
    saver = checkpointer(tmp_path, keep=keep, keep_every=keep_every)
    for step in range(1, 10):
        state.step = step
        saver.save(state, {})
    saver.finish()
    assert saver.steps() == left
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in left]


def test_a_checkpoint_that_is_being_deleted_is_not_complete(tmp_path, monkeypatch):
    """Killed while it deletes an old one: what is left of that must not look whole."""
    state = make_state(training_config())
    saver = checkpointer(tmp_path, keep=1)
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **options: None)
    for step in (1, 2):
        state.step = step
        saver.save(state, {}, wait=True)
    assert saver.steps() == [2]


@pytest.fixture
def full_disk(monkeypatch):
    """The disk takes no more bytes of tensors."""

    def _fill():
        def fail(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", fail)

    return _fill


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_costs_a_periodic_checkpoint_only(tmp_path, full_disk, caplog, asynchronous):
    state = make_state(training_config())
    saver = checkpointer(tmp_path, asynchronous=asynchronous)
    state.step = 1
    saver.save(state, {}, wait=True)
    full_disk()
    state.step = 2
    with caplog.at_level(logging.ERROR):
        saver.save(state, {})
        saver.finish()
    assert "step-00000002: could not be saved: OSError: [Errno 28] No space left on device" in caplog.text
    assert "Earlier checkpoints are untouched" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    with pytest.raises(CheckpointError, match=r"step-00000002: could not be saved.*No space left") as error:
        saver.save(state, {}, wait=True)
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)
    checkpointer(tmp_path).load(state, 1)
    assert state.step == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be saved"):
        checkpointer(tmp_path / "file" / "checkpoints").save(make_state(training_config()), {}, wait=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "truncated tensors": lambda folder: truncate(folder / "__0_0.distcp"),
    "no tensors": lambda folder: (folder / "__0_0.distcp").unlink(),
    "empty tensors": lambda folder: (folder / "__0_0.distcp").write_bytes(b""),
    "truncated metadata": lambda folder: truncate(folder / ".metadata"),
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
    "empty metadata": lambda folder: (folder / ".metadata").write_bytes(b""),
    "garbage metadata": lambda folder: (folder / ".metadata").write_bytes(b"garbage" * 100),
    "truncated facts": lambda folder: truncate(folder / "checkpoint.json"),
    "foreign facts": lambda folder: (folder / "checkpoint.json").write_text('{"format": "other"}'),
    "facts that are no mapping": lambda folder: (folder / "checkpoint.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_error(tmp_path, damage):
    state = make_state(training_config())
    state.step = 3
    checkpointer(tmp_path).save(state, {}, wait=True)
    DAMAGE[damage](tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match="step-00000003") as error:
        checkpointer(tmp_path).load(make_state(training_config()), 3)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_optimizer_names_what_is_missing(tmp_path):
    state, _ = trained(1)
    checkpointer(tmp_path).save(state, {}, wait=True)
    other = make_state(training_config(), MuonConfig())
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*optimizer\.state\.layers\.\d\.\S+\.momentum"):
        checkpointer(tmp_path).load(other, 1)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    state, _ = trained(1)
    checkpointer(tmp_path).save(state, {}, wait=True)
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*Size mismatch .*model\.embedding\.weight"):
        checkpointer(tmp_path).load(make_state(training_config(), vocab_size=128), 1)


@pytest.mark.parametrize(("then", "now"), [("fp32", "fp16"), ("fp16", "bf16"), ("bf16", "fp32")])
def test_the_precision_may_change(tmp_path, then, now):
    state, _ = trained(2, precision=then)
    checkpointer(tmp_path).save(state, {}, wait=True)
    other = make_state(training_config(precision=now))
    checkpointer(tmp_path).load(other, 2)
    _, losses = trained(4, other, precision=now)
    assert len(losses) == 2


def test_the_rate_and_decay_are_the_configurations_not_the_checkpoints(tmp_path):
    state, _ = trained(1, optimizer=AdamWConfig(lr=0.5, weight_decay=0.5))
    checkpointer(tmp_path).save(state, {}, wait=True)
    other = make_state(training_config(), AdamWConfig(lr=0.25, weight_decay=0.125))
    checkpointer(tmp_path).load(other, 1)
    assert other.optimizers.set_lr(1.0) == 0.25
    assert other.optimizers.optimizers[0].param_groups[0]["weight_decay"] == 0.125


def test_nothing_is_said_about_single_processes(tmp_path):
    state = make_state(training_config())
    state.step = 1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        saver = checkpointer(tmp_path)
        saver.save(state, {}, wait=True)
        saver.load(state, 1)
    assert [str(w.message) for w in seen if "torch.distributed" in str(w.message)] == []


class Interrupt(Callback):
    def __init__(self, at):
        self.at = at

    def start(self, loop):
        loop.interrupted = loop.state.step == self.at

    def step(self, loop, record):
        loop.interrupted = record.step == self.at


@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("optimizer", [AdamWConfig(lr=0.01), MuonConfig(lr=0.01)], ids=lambda o: o.kind)
def test_an_interrupted_run_goes_on_exactly(tmp_path, stop, optimizer):
    """Also one that was interrupted before its first step."""
    _, expected = trained(6, optimizer=optimizer)
    saver = checkpointer(tmp_path, every=2)
    callbacks = [Interrupt(stop), SaveCheckpoints(saver, lambda step: {})]
    _, losses = trained(6, optimizer=optimizer, callbacks=callbacks)
    assert len(losses) == stop
    fresh = make_state(training_config(), optimizer)
    if saver.steps():
        saver.load(fresh, saver.steps()[-1])
    assert fresh.step == stop
    _, rest = trained(6, fresh)
    assert losses + rest == expected


def test_what_is_saved_is_a_plain_distributed_checkpoint(tmp_path):
    """PyTorch's own tools read it: weights by name, a tied one once."""
    state, _ = trained(1)
    checkpointer(tmp_path).save(state, {}, wait=True)
    metadata = dcp.FileSystemReader(tmp_path / "step-00000001").read_metadata()
    weights = {name for name in metadata.state_dict_metadata if name.startswith("model.")}
    assert weights == {f"model.{name}" for name, _ in state.model.named_parameters()}
