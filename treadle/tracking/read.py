"""Reading a run folder. Every function takes the folder, needs no lock, and may be called while the run goes on."""

import json
from pathlib import Path
from typing import Any

from treadle.errors import RunError
from treadle.tracking.files import read_lines, restore_floats

STATUS_FILE = "status.json"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
LOG_FILE = "log.txt"


def load_metrics(folder: str | Path, kind: str | None = None) -> dict[str, list[Any]]:
    """The logged metrics as columns of one length, ordered by step; None where a record lacks a metric.

    Besides the metrics there are `step`, `time` (seconds of running since the run began) and `kind`. `kind="train"` or
    `"evaluate"` selects records. Where a step was logged more than once, as after a resume, the last value wins.
    """
    folder = Path(folder)
    _require_run(folder)
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for record in read_lines(folder / METRICS_FILE):
        if "step" in record and "kind" in record and kind in (None, record["kind"]):
            merged.setdefault((record["kind"], record["step"]), {}).update(record)
    records = sorted(merged.values(), key=lambda record: record["step"])
    names = dict.fromkeys(("step", "time", "kind"))
    for record in records:
        names.update(dict.fromkeys(record))
    restored = [{**restore_floats(record), "kind": record["kind"]} for record in records]
    return {name: [record.get(name) for record in restored] for name in names}


def load_samples(folder: str | Path) -> list[dict[str, Any]]:
    """The logged samples, ordered by step: `{"step", "prompt", "text"}`. A prompt sampled again at a step replaces."""
    folder = Path(folder)
    _require_run(folder)
    samples = {(sample.get("step", 0), sample.get("prompt")): sample for sample in read_lines(folder / SAMPLES_FILE)}
    return sorted(samples.values(), key=lambda sample: sample.get("step", 0))


def load_status(folder: str | Path) -> dict[str, Any]:
    """`status.json`: state as the run last wrote it, times, last step, latest metrics, summary. Raises RunError."""
    status = _load_json(Path(folder), STATUS_FILE)
    metrics, summary = status.get("metrics", {}), status.get("summary", {})
    if not isinstance(status.get("state"), str) or not isinstance(metrics, dict) or not isinstance(summary, dict):
        raise RunError(f"{Path(folder) / STATUS_FILE}: not the status of a run.")
    return status | {"metrics": restore_floats(metrics), "summary": restore_floats(summary)}


def load_environment(folder: str | Path) -> dict[str, Any]:
    """`environment.json`: git state, versions, hardware, command line. Raises RunError."""
    return _load_json(Path(folder), ENVIRONMENT_FILE)


def load_config(folder: str | Path) -> dict[str, Any]:
    """`config.yaml` as plain dicts and lists. Raises RunError."""
    import yaml

    path = Path(folder) / CONFIG_FILE
    # libyaml's loader reads the same language about ten times faster; an index of thousands of runs notices.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        config = yaml.load(path.read_bytes(), Loader=loader)
    except (OSError, yaml.YAMLError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key, lists by position: `{"model.layers[0].mixer.kind": "attention", ...}`."""
    if isinstance(config, dict) and config:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in config.items()]
    elif isinstance(config, list) and config:
        items = [(f"{prefix}[{position}]", value) for position, value in enumerate(config)]
    else:
        return {prefix: config} if prefix else {}
    return {key: leaf for path, value in items for key, leaf in flatten(value, path).items()}


def _require_run(folder: Path) -> None:
    if not (folder / STATUS_FILE).is_file():
        raise RunError(f"{folder}: no run here (it has no {STATUS_FILE}).")


def _load_json(folder: Path, name: str) -> dict[str, Any]:
    _require_run(folder)
    try:
        value = json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / name}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{folder / name}: expected a JSON object, found {type(value).__name__}.")
    return value
