"""Where a run's metrics may go besides its folder: TensorBoard, Weights & Biases, MLflow, several at once.

All three write local files by default and send nothing. The packages are optional and loaded by `build`, so a
missing one is reported before the run begins. A sink that fails later is dropped by the run; see `Run`.
"""

import importlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from treadle.config.base import Config, Kind
from treadle.errors import ConfigError
from treadle.tracking.read import flatten

MLFLOW_PARAMETERS_PER_CALL = 100
MLFLOW_PARAMETER_LENGTH = 500


class Sink(ABC):
    """A listener to one run. Calls come in order from one thread; an exception means: do not call me again."""

    @abstractmethod
    def start(self, folder: Path, config: Mapping[str, Any], resumed: bool) -> None:
        """The run in `folder` (its name is the run's id) begins, or goes on if `resumed`."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float], kind: str) -> None: ...

    @abstractmethod
    def sample(self, step: int, prompt: str, text: str) -> None: ...

    @abstractmethod
    def summary(self, values: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def close(self, state: str) -> None:
        """The run has ended as "finished", "interrupted" or "failed"."""


class SinkConfig(Kind):
    """One sink, chosen by its `kind`."""

    def build(self) -> Sink:
        """Raises ConfigError if the sink's package is not installed."""
        raise NotImplementedError


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"sink '{package}' needs the package {package}, which cannot be imported ({error}): "
            f"pip install 'treadle[{package}]'"
        ) from error


class TensorBoardConfig(SinkConfig):
    """Event files in `<run>/tensorboard`."""

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self) -> Sink:
        _require("tensorboard")
        return TensorBoardSink()


class TensorBoardSink(Sink):
    # Written with TensorBoard's own writer: torch's SummaryWriter would add one event per value and need torch.

    def start(self, folder: Path, config: Mapping[str, Any], resumed: bool) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # The queue is bounded and a full one blocks the training thread; the default holds 10 events.
        self._writer = EventFileWriter(str(folder / "tensorboard"), max_queue_size=1000, flush_secs=10)
        self._rewind = resumed

    def log(self, step: int, metrics: Mapping[str, float], kind: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=f"{kind}/{name}", simple_value=float(value)) for name, value in metrics.items()]
        self._add(step, Summary(value=values))

    def sample(self, step: int, prompt: str, text: str) -> None:
        import numpy as np
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text import metadata
        from tensorboard.util import tensor_util

        content = f"**{prompt}**{text}".encode("utf-8", "backslashreplace")
        tensor = tensor_util.make_tensor_proto(content, dtype=np.object_)
        described = metadata.create_summary_metadata(display_name="sample", description="")
        self._add(step, Summary(value=[Summary.Value(tag="sample", metadata=described, tensor=tensor)]))

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self._rewind:  # tells TensorBoard to forget what the earlier process logged from this step on
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))
            self._rewind = False
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def summary(self, values: Mapping[str, Any]) -> None:
        """TensorBoard has no place for it."""

    def close(self, state: str) -> None:
        self._writer.close()


class WandbConfig(SinkConfig):
    """Weights & Biases. Offline by default: files in `<run>/wandb`, sent by `wandb sync` when you choose to."""

    kind: Literal["wandb"] = "wandb"
    project: str = "treadle"
    """W&B project"""
    entity: str | None = None
    """user or team that owns the project; null: the account's default"""
    mode: Literal["offline", "online"] = "offline"
    """online sends as the run goes"""

    def build(self) -> Sink:
        if self.mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports would be sent even so
        return WandbSink(self, _require("wandb"))


class WandbSink(Sink):
    def __init__(self, config: WandbConfig, wandb: Any):
        self._config = config
        self._wandb = wandb

    def start(self, folder: Path, config: Mapping[str, Any], resumed: bool) -> None:
        self._run = self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            dir=str(folder),
            name=folder.name,
            id=folder.name,
            # Only the server knows the earlier part; offline, `wandb sync --append` joins the parts by their id.
            resume="allow" if self._config.mode == "online" else None,
            config=dict(config),
        )
        # wandb's own step may not go back, ours does after a resume: so ours is the axis, as a metric of its own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float], kind: str) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in metrics.items()}})

    def sample(self, step: int, prompt: str, text: str) -> None:
        table = self._wandb.Table(columns=["step", "prompt", "text"], data=[[step, prompt, text]])
        self._run.log({"step": step, "sample": table})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def close(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)


class MlflowConfig(SinkConfig):
    """MLflow. By default a database file beside the runs, `<root>/mlflow.db`: `mlflow ui --backend-store-uri` opens it.

    Not the old `./mlruns` folder: MLflow refuses to write one since version 3.14.
    """

    kind: Literal["mlflow"] = "mlflow"
    experiment: str = "treadle"
    """MLflow experiment"""
    uri: str | None = None
    """tracking server or database; null: <root>/mlflow.db"""

    def build(self) -> Sink:
        if self.uri is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        return MlflowSink(self, _require("mlflow"))


class MlflowSink(Sink):
    def __init__(self, config: MlflowConfig, mlflow: Any):
        self._config = config
        self._mlflow = mlflow

    def start(self, folder: Path, config: Mapping[str, Any], resumed: bool) -> None:
        # A client, not mlflow.start_run: the user's own active run and tracking URI stay theirs.
        root = folder.resolve().parent
        self._client = self._mlflow.MlflowClient(tracking_uri=self._config.uri or f"sqlite:///{root}/mlflow.db")
        artifacts = None if self._config.uri else (root / "mlflow-artifacts").as_uri()
        experiment = self._experiment(artifacts)
        found = self._client.search_runs([experiment], f"tags.treadle_run = '{folder.name}'") if resumed else []
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"treadle_run": folder.name}
        self._run = self._client.create_run(experiment, run_name=folder.name, tags=tags).info.run_id
        self._log_parameters(config)

    def _experiment(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(self._config.experiment)
        if found is not None:
            return found.experiment_id
        return self._client.create_experiment(self._config.experiment, artifact_location=artifacts)

    def _log_parameters(self, config: Mapping[str, Any]) -> None:
        parameter = self._mlflow.entities.Param
        parameters = [
            parameter(key.replace("[", ".").replace("]", ""), str(value)[:MLFLOW_PARAMETER_LENGTH])
            for key, value in flatten(dict(config)).items()
        ]
        for start in range(0, len(parameters), MLFLOW_PARAMETERS_PER_CALL):
            self._client.log_batch(self._run, params=parameters[start : start + MLFLOW_PARAMETERS_PER_CALL])

    def log(self, step: int, metrics: Mapping[str, float], kind: str) -> None:
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        batch = [metric(f"{kind}/{name}", float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=batch)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._client.log_text(self._run, f"{prompt}{text}", f"samples/{step:09d}-{time.time_ns()}.txt")

    def summary(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._client.log_metric(self._run, f"summary/{name}", value)
            else:
                self._client.set_tag(self._run, f"summary/{name}", str(value))

    def close(self, state: str) -> None:
        status = {"finished": "FINISHED", "interrupted": "KILLED"}.get(state, "FAILED")
        self._client.set_terminated(self._run, status=status)


class TrackingConfig(Config):
    """The `tracking` part of a recipe. The run folder is always written; sinks come on top."""

    sinks: tuple[SinkConfig, ...] = ()
    """where metrics go besides the run folder: tensorboard, wandb, mlflow"""

    def build(self) -> list[Sink]:
        """A sink for each entry. Raises ConfigError if a package is missing."""
        return [sink.build() for sink in self.sinks]
