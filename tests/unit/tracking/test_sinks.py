"""Sinks: TensorBoard for real, the others against the calls their clients document; and a failing one."""

import logging
import math
import sys
from types import SimpleNamespace

import pytest

from treadle.errors import ConfigError
from treadle.tracking import Run, load_metrics
from treadle.tracking.sinks import Sink, TrackingConfig

CONFIG = {"optimizer": {"lr": 3e-4}, "layers": [{"kind": "a"}]}


def record(root, *kinds, then=None):
    """A run with these sinks, and what a resumed one adds when `then` is given."""
    with Run.create(root, "trial", CONFIG, "", TrackingConfig(sinks=kinds).build()) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": float(step)})
        run.log(3, {"loss": math.nan}, kind="evaluate")
        run.sample(3, "The loom", " weaves")
        run.summary(loss=3.0)
    if then is not None:
        with Run.resume(run.folder, TrackingConfig(sinks=kinds).build()) as run:
            run.log(then, {"loss": 30.0})
    return run.folder


def test_tensorboard_shows_metrics_and_samples(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = record(tmp_path, "tensorboard", then=2)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "evaluate/loss"]
    # The resumed run went back to step 2: what came after it is forgotten, as TensorBoard does.
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 30.0)]
    assert events.PluginTagToContent("text").keys() == {"sample"}


def test_tensorboard_keeps_the_sample(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(record(tmp_path, "tensorboard") / "tensorboard"))
    events.Reload()
    (sample,) = events.Tensors("sample")
    assert (sample.step, sample.tensor_proto.string_val) == (3, [b"**The loom** weaves"])
    assert math.isnan(events.Scalars("evaluate/loss")[0].value)


class Calls:
    """Stands for any client: records every call as (name, args, kwargs)."""

    def __init__(self, log, **answers):
        self._log, self._answers = log, answers

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self._log.append((name, args, kwargs))
            return self._answers.get(name)

        return call


def test_wandb_is_offline_and_uses_our_step_as_axis(tmp_path, monkeypatch):
    log, opened = [], []
    run = Calls(log)
    run.summary = {}

    def init(**settings):
        opened.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Table=lambda **content: content))
    folder = record(tmp_path, {"kind": "wandb", "project": "looms"})
    (settings,) = opened
    assert settings["mode"] == "offline"
    assert (settings["project"], settings["id"], settings["config"]) == ("looms", folder.name, CONFIG)
    assert ("define_metric", ("*",), {"step_metric": "step"}) in log
    logged = [args[0] for name, args, _ in log if name == "log"]
    assert logged[:3] == [{"step": step, "train/loss": float(step)} for step in (1, 2, 3)]
    assert logged[4]["sample"]["data"] == [[3, "The loom", " weaves"]]
    assert run.summary == {"loss": 3.0}
    assert log[-1] == ("finish", (), {"exit_code": 0})


def test_mlflow_writes_a_local_database_and_goes_on_with_its_run(tmp_path, monkeypatch):
    log, opened, known = [], [], []
    info = SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    class Client(Calls):
        def search_runs(self, experiments, condition):
            log.append(("search_runs", (experiments, condition), {}))
            return known

        def create_run(self, experiment, run_name, tags):
            known.append(info)
            return info

    def client(tracking_uri):
        opened.append(tracking_uri)
        return Client(log, create_experiment="e1")

    def tuples(*values):
        return values

    entities = SimpleNamespace(Metric=tuples, Param=tuples)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=client, entities=entities))
    folder = record(tmp_path, "mlflow", then=4)
    assert opened == [f"sqlite:///{tmp_path}/mlflow.db"] * 2
    assert ("search_runs", (["e1"], f"tags.treadle_run = '{folder.name}'"), {}) in log
    batches = [kwargs for name, args, kwargs in log if name == "log_batch" and args == ("r1",)]
    assert batches[0] == {"params": [("optimizer.lr", "0.0003"), ("layers.0.kind", "a")]}
    metrics = [batch["metrics"][0] for batch in batches[1:]]
    assert [(key, value, step) for key, value, _, step in metrics if key == "train/loss"] == [
        ("train/loss", float(value), step) for value, step in ((1, 1), (2, 2), (3, 3), (30, 4))
    ]
    states = [kwargs["status"] for name, _, kwargs in log if name in ("set_terminated", "update_run")]
    assert states == ["FINISHED", "RUNNING", "FINISHED"]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_the_extra(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ConfigError, match=rf"pip install 'treadle\[{kind}\]'"):
        TrackingConfig(sinks=(kind,)).build()


class Broken(Sink):
    def __init__(self, at):
        self.at, self.calls = at, []

    def _called(self, name):
        self.calls.append(name)
        if name == self.at:
            raise ConnectionError("no route")

    def start(self, folder, config, resumed):
        self._called("start")

    def log(self, step, metrics, kind):
        self._called("log")

    def sample(self, step, prompt, text):
        self._called("sample")

    def summary(self, values):
        self._called("summary")

    def close(self, state):
        self._called(f"close {state}")


CALLS = ["start", "log", "sample", "log", "summary", "close finished"]


@pytest.mark.parametrize("at", ["start", "log", "sample", "summary", "close finished"])
def test_a_failing_sink_is_dropped_with_one_warning(tmp_path, caplog, at):
    broken, healthy = Broken(at), Broken(None)
    with caplog.at_level(logging.WARNING), Run.create(tmp_path, "trial", {}, "", [broken, healthy]) as run:
        run.log(1, {"loss": 1.0})
        run.sample(1, "a", "b")
        run.log(2, {"loss": 1.0})
        run.summary(loss=1.0)
    assert broken.calls == CALLS[: CALLS.index(at) + 1]
    assert healthy.calls == CALLS
    assert [record.message for record in caplog.records] == [
        "Broken failed and gets no more of this run: ConnectionError('no route')"
    ]
    assert load_metrics(run.folder)["step"] == [1, 2]


def test_an_interrupt_inside_a_sink_is_not_swallowed(tmp_path):
    class Slow(Broken):
        def log(self, step, metrics, kind):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Run.create(tmp_path, "trial", {}, "", [Slow(None)]) as run:
        run.log(1, {"loss": 1.0})
