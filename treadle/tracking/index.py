"""A cache of every run's status and configuration, so that thousands of runs are listed at once.

The run folders are the truth. `<root>/index.json` is brought up to date on each reading by comparing modification
times, and may be deleted at any moment. A damaged one is made again; where it cannot be written, reading is slower.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treadle.errors import RunError
from treadle.tracking import read
from treadle.tracking.files import write_atomically
from treadle.tracking.lock import is_locked
from treadle.tracking.query import RunRecord

INDEX_FILE = "index.json"
VERSION = 2

Rows = dict[str, dict[str, Any]]  # by id: the marks of the two files, and what was read from them


def records(root: Path) -> list[RunRecord]:
    """Every run directly under `root`, brought up to date; unordered. Empty if `root` does not exist."""
    if not root.is_dir():
        return []
    known = _load(root)
    rows: Rows = {}
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir() and (status_mark := _mark(Path(entry.path, read.STATUS_FILE))):
                rows[entry.name] = _row(Path(entry.path), status_mark, known.get(entry.name, {}))
    if rows != known:
        with contextlib.suppress(OSError):
            write_atomically(root / INDEX_FILE, json.dumps({"version": VERSION, "runs": rows}).encode())
    return [_record(root / run_id, row["status"], row["config"]) for run_id, row in rows.items()]


def _load(root: Path) -> Rows:
    try:
        content = json.loads((root / INDEX_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    found: Rows = content["runs"] if isinstance(content, dict) and content.get("version") == VERSION else {}
    return found


def record_of(folder: Path) -> RunRecord:
    """One run, read from its folder. Raises RunError if there is none."""
    return _record(folder, read.load_status(folder), read.flatten(_readable(read.load_config, folder)))


def _row(folder: Path, status_mark: str, known: dict[str, Any]) -> dict[str, Any]:
    """What the index keeps of a run. Marks are taken before the files are read, so a later change is noticed later."""
    config_mark = _mark(folder / read.CONFIG_FILE)
    row = {**known}
    if row.get("status_mark") != status_mark:
        row |= {"status_mark": status_mark, "status": _readable(read.load_status, folder)}
    if row.get("config_mark") != config_mark:  # YAML is slow to parse, and a running run changes its status only
        config = read.flatten(_readable(read.load_config, folder))
        row |= {"config_mark": config_mark, "config": json.loads(json.dumps(config, default=str))}
    return row


def _mark(path: Path) -> str:
    """Changes whenever the file is replaced or edited; empty if there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return ""
    # The inode tells apart two replacements within one tick of the file system's clock.
    return f"{stat.st_mtime_ns}:{stat.st_size}:{stat.st_ino}"


def _readable(load: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    try:
        return load(folder)
    except RunError as error:
        return {"state": "unreadable", "error": str(error)} if load is read.load_status else {}


def _record(folder: Path, status: dict[str, Any], config: dict[str, Any]) -> RunRecord:
    state = status.get("state", "unreadable")
    if state == "running" and not is_locked(folder):
        state = "died"
    facts = {key: status[key] for key in ("name", "started", "updated", "step", "elapsed", "resumes") if key in status}
    return RunRecord(
        id=folder.absolute().name,
        folder=folder,
        state=state,
        error=status.get("error"),
        metrics=status.get("metrics", {}),
        summary=status.get("summary", {}),
        config=config,
        **facts,
    )
