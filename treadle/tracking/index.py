"""A cache of every run's status and configuration, so that thousands of runs are listed at once.

The run folders are the truth. `<root>/index.sqlite` is brought up to date on each reading by comparing modification
times, and may be deleted at any moment; a damaged one is rebuilt. Where it cannot be written (a read-only root, a file
system without SQLite's locks) the folders are read into memory instead.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from treadle.errors import RunError
from treadle.tracking import read
from treadle.tracking.lock import is_locked
from treadle.tracking.query import RunRecord

INDEX_FILE = "index.sqlite"
VERSION = 1
READ_TIMEOUT_SECONDS = 5.0
# The writer is a training loop: if the index is busy, the next reader catches up by itself.
WRITE_TIMEOUT_SECONDS = 0.1
_UNUSABLE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_PERM,
)
_TABLE = """CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    status_mark TEXT NOT NULL,
    config_mark TEXT NOT NULL,
    status TEXT NOT NULL,
    config TEXT NOT NULL
)"""


class Index:
    """The index of the run folders directly under `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.path = root / INDEX_FILE

    def records(self) -> list[RunRecord]:
        """Every run, brought up to date; unordered. Empty if `root` does not exist."""
        if not self.root.is_dir():
            return []
        return self._attempt(self._refresh_and_read)

    def rebuild(self) -> int:
        """Forget everything and read all folders again. Returns the number of runs."""
        self._delete()
        return len(self.records())

    @staticmethod
    def note(folder: Path) -> None:
        """Bring one run's row up to date, if its root has an index. Never raises: the next reader finds out."""
        index = Index(folder.parent)
        if index.path.exists():
            with contextlib.suppress(sqlite3.Error, OSError), index._connect(WRITE_TIMEOUT_SECONDS) as connection:
                index._store(connection, folder.name, _marks(folder), known_config_mark=None)

    def _attempt(self, job: Callable[[sqlite3.Connection], list[RunRecord]]) -> list[RunRecord]:
        """Run `job` on the index; on a rebuilt one if it is damaged; in memory if it cannot be used."""
        for _ in range(2):
            try:
                with self._connect(READ_TIMEOUT_SECONDS) as connection:
                    return job(connection)
            except (sqlite3.DatabaseError, ValueError) as error:
                if getattr(error, "sqlite_errorcode", -1) & 0xFF in _UNUSABLE:
                    break
                self._delete()
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.execute(_TABLE)
            return job(connection)

    @contextlib.contextmanager
    def _connect(self, timeout: float) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=timeout)) as connection:
            if _version(connection) != VERSION:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("BEGIN IMMEDIATE")
                if _version(connection) != VERSION:  # nobody was faster
                    connection.execute("DROP TABLE IF EXISTS runs")
                    connection.execute(_TABLE)
                    connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.commit()
            connection.execute("PRAGMA synchronous = NORMAL")  # no fsync per row: a lost row is read again
            with connection:
                yield connection

    def _delete(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(f"{self.path}{suffix}")

    def _refresh_and_read(self, connection: sqlite3.Connection) -> list[RunRecord]:
        known = {
            row[0]: (row[1], row[2]) for row in connection.execute("SELECT id, status_mark, config_mark FROM runs")
        }
        found = dict(self._scan())
        for run_id in known.keys() - found.keys():
            connection.execute("DELETE FROM runs WHERE id = ?", (run_id,))
        for run_id, marks in found.items():
            if known.get(run_id) != marks:
                self._store(connection, run_id, marks, known.get(run_id, ("", ""))[1])
        rows = connection.execute("SELECT id, status, config FROM runs")
        return [_record(self.root / run_id, json.loads(status), json.loads(config)) for run_id, status, config in rows]

    def _scan(self) -> Iterator[tuple[str, tuple[str, str]]]:
        with os.scandir(self.root) as entries:
            for entry in entries:
                marks = _marks(Path(entry.path)) if entry.is_dir() else ("", "")
                if marks[0]:
                    yield entry.name, marks

    def _store(
        self, connection: sqlite3.Connection, run_id: str, marks: tuple[str, str], known_config_mark: str | None
    ) -> None:
        """Write one row. The marks were taken before the files are read here, so a later change is noticed later."""
        folder = self.root / run_id
        status = json.dumps(_readable(read.load_status, folder))
        if known_config_mark is None:
            row = connection.execute("SELECT config_mark FROM runs WHERE id = ?", (run_id,)).fetchone()
            known_config_mark = row[0] if row else ""
        if known_config_mark == marks[1]:  # YAML is slow to parse, and a running run changes its status only
            connection.execute("UPDATE runs SET status_mark = ?, status = ? WHERE id = ?", (marks[0], status, run_id))
            return
        config = json.dumps(read.flatten(_readable(read.load_config, folder)), default=str)
        connection.execute("REPLACE INTO runs VALUES (?, ?, ?, ?, ?)", (run_id, *marks, status, config))


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def record_of(folder: Path) -> RunRecord:
    """One run, read from its folder. Raises RunError if there is none."""
    return _record(folder, read.load_status(folder), read.flatten(_readable(read.load_config, folder)))


def _marks(folder: Path) -> tuple[str, str]:
    return _mark(folder / read.STATUS_FILE), _mark(folder / read.CONFIG_FILE)


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
