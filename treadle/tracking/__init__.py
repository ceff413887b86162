"""Experiment tracking: a folder per run, always written, with an index over all of them. No network.

`Run` writes one run, `load_metrics` and its neighbours read one, `Runs` lists and finds them. Sinks (`sinks.py`) and
figures (`plot.py`) are imported by those who need them.
"""

from treadle.tracking.read import load_config, load_environment, load_metrics, load_samples, load_status
from treadle.tracking.run import Run
from treadle.tracking.runs import Runs

__all__ = ["Run", "Runs", "load_config", "load_environment", "load_metrics", "load_samples", "load_status"]
