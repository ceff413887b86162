"""One run as a row, and the questions that `treadle runs list` asks of it: conditions and sort keys."""

import difflib
import math
import operator as op
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from treadle.errors import RunError

FACTS = ("id", "name", "state", "started", "updated", "step", "elapsed")
_OPERATORS = {"=": op.eq, "==": op.eq, "!=": op.ne, "<": op.lt, "<=": op.le, ">": op.gt, ">=": op.ge}
_CONDITION = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run without reading its metrics.

    state: running, finished, interrupted, failed; died (killed: it says running, but no process holds its lock); or
        unreadable (its status cannot be read, `error` says why).
    started, updated: ISO 8601, UTC. elapsed: seconds of running. step: the last one logged.
    metrics: the latest value of each metric, `loss` for training, `evaluate/loss` for other kinds.
    summary: what `Run.summary` was given. config: leaves by dotted key.
    """

    id: str
    folder: Path
    state: str
    name: str = ""
    started: str = ""
    updated: str = ""
    step: int = 0
    elapsed: float = 0.0
    resumes: int = 0
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        return key in FACTS or any(key in values for values in (self.summary, self.metrics, self.config))

    def value(self, key: str) -> Any:
        """The first of: a fact (`state`, `step`, ...), a summary value, a latest metric, a config leaf; else None."""
        if key in FACTS:
            return getattr(self, key)
        return next((values[key] for values in (self.summary, self.metrics, self.config) if key in values), None)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class Condition:
    """`key operator value`: numbers compare as numbers, all else as text. A run without the key only satisfies `!=`."""

    key: str
    operator: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `optimizer.lr=3e-4` or `loss<2`; operators = != < <= > >=. Raises RunError."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise RunError(f"condition '{text}': expected key=value, or != < <= > >= in place of =.")
        key, operator, value = match.groups()
        return cls(key, operator, value)

    def matches(self, run: RunRecord) -> bool:
        if not run.has(self.key):
            return self.operator == "!="
        found = run.value(self.key)
        left, right = _number(found), _number(self.text)
        holds = _OPERATORS[self.operator]
        return bool(holds(_as_text(found), self.text) if left is None or right is None else holds(left, right))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _as_text(value: Any) -> str:
    # As YAML writes it: the user copies the value from a configuration file.
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def sort_runs(runs: Iterable[RunRecord], key: str) -> list[RunRecord]:
    """Ascending by `key`, descending by `-key`; runs without a value, or with NaN, come last either way."""
    name = key.removeprefix("-")
    valued: list[RunRecord] = []
    rest: list[RunRecord] = []
    for run in runs:
        value = run.value(name)
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        (rest if missing else valued).append(run)

    def order(run: RunRecord) -> tuple[bool, float, str]:
        number = _number(run.value(name))
        return (number is None, number or 0.0, "" if number is not None else str(run.value(name)))

    return sorted(valued, key=order, reverse=key.startswith("-")) + rest


def require_known(keys: Sequence[str], runs: Sequence[RunRecord]) -> None:
    """Raise RunError for a key that none of `runs` has: an empty list would hide the typing mistake."""
    for key in keys:
        if runs and not any(run.has(key) for run in runs):
            known = {*FACTS}.union(*(run.summary.keys() | run.metrics.keys() | run.config.keys() for run in runs))
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise RunError(f"'{key}': no run has a config key, summary value or metric of this name.{hint}")
