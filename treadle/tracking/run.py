"""The run folder: everything one training run leaves behind, written so that a kill at any moment loses a line at most.

config.yaml       the resolved configuration      metrics.jsonl   one record per logged step
environment.json  code, versions, hardware        samples.jsonl   generated text
status.json       state, last step, summary       log.txt         the "treadle" logger
lock              held while a process writes     checkpoints/    not ours
"""

import contextlib
import itertools
import logging
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from treadle.errors import RunError
from treadle.tracking import read
from treadle.tracking.environment import environment
from treadle.tracking.files import LineWriter, json_page, read_last_line, write_atomically
from treadle.tracking.lock import FolderLock

if TYPE_CHECKING:
    from treadle.tracking.sinks import Sink

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
RESERVED = frozenset(("step", "time", "kind"))

EndState = Literal["finished", "interrupted", "failed"]


class Run:
    """One training run, open for writing. Made by `Run.create` or `Run.resume`; used from one thread.

    As a context manager it ends as finished, as interrupted (KeyboardInterrupt, SystemExit) or as failed. A sink that
    raises is dropped with one warning, and a full disk costs metrics and one warning: neither stops training.
    """

    def __init__(self, folder: Path, lock: FolderLock, status: dict[str, Any]):
        self.folder = folder
        self._here = folder.absolute()  # the process may change its directory
        self.id = self._here.name
        self._lock = lock
        self._status = status
        self._open = True
        self._disk_failed = False
        self._sinks: list[Sink] = []
        self._metrics = LineWriter(folder / read.METRICS_FILE)
        self._samples = LineWriter(folder / read.SAMPLES_FILE)
        self._began = time.monotonic() - status["elapsed"]
        self._log_file = _attach_log(folder / read.LOG_FILE)
        self._heartbeat()

    @classmethod
    def create(
        cls,
        root: Path,
        name: str,
        config: Mapping[str, Any],
        config_yaml: str,
        sinks: Sequence["Sink"] = (),
        folder: Path | None = None,
    ) -> Self:
        """A new run in `root/<name>-<date>-<time>`, or in exactly `folder`.

        Raises RunError if `folder` holds a run already or another process writes it.
        """
        folder = _new_folder(Path(root), name) if folder is None else Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        try:
            if (folder / read.STATUS_FILE).exists():
                raise RunError(f"{folder}: holds a run already. Resume it, or choose another folder.")
            write_atomically(folder / read.CONFIG_FILE, config_yaml.encode())
            write_atomically(folder / read.ENVIRONMENT_FILE, json_page(environment()))
            now = _now()
            status = {
                "name": name,
                "started": now,
                "resumes": 0,
                "step": 0,
                "elapsed": 0.0,
                "metrics": {},
                "summary": {},
            }
            run = cls(folder, lock, status)
        except BaseException:
            lock.release()
            raise
        run._start_sinks(sinks, config, resumed=False)
        return run

    @classmethod
    def resume(
        cls,
        folder: Path,
        sinks: Sequence["Sink"] = (),
        config: Mapping[str, Any] | None = None,
    ) -> Self:
        """Go on with the run in `folder`, however it ended. Nothing in it is deleted.

        A new environment replaces the old file, which stays beside it as `environment-1.json`, and so on; a new
        configuration does so once it is accepted (`accept_config`). Raises RunError if there is no run in `folder` or
        another process writes it.
        """
        folder = Path(folder)
        read.load_status(folder)  # refuses a folder without a run before a lock file is made in it
        lock = FolderLock(folder)
        try:
            status = read.load_status(folder)  # again: the holder that we waited for may have written
            status["resumes"] = status.get("resumes", 0) + 1
            last = read_last_line(folder / read.METRICS_FILE) or {}  # newer than the status if the process was killed
            status["elapsed"] = max(status.get("elapsed", 0.0), last.get("time", 0.0))
            status["step"] = last.get("step", status.get("step", 0))
            _replace_keeping_old(folder / read.ENVIRONMENT_FILE, json_page(environment()))
            run = cls(folder, lock, status)
        except BaseException:
            lock.release()
            raise
        run._start_sinks(sinks, read.load_config(folder) if config is None else config, resumed=True)
        return run

    def accept_config(self, config_yaml: str) -> None:
        """Make this the run's configuration; a different older one stays beside it as `config-1.yaml`, and so on."""
        _replace_keeping_old(self.folder / read.CONFIG_FILE, config_yaml.encode())

    def log(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
        """Record `metrics` (anything float() takes) at `step`. Several calls at one step and kind add up."""
        if not RESERVED.isdisjoint(metrics):
            raise ValueError(f"metrics named {sorted(RESERVED & set(metrics))}: these names are the record's own")
        values = {name: value if type(value) is int else float(value) for name, value in metrics.items()}
        record = {"step": step, "time": round(time.monotonic() - self._began, 3), "kind": kind, **values}
        self._append(self._metrics, record)
        self._status["step"] = step
        prefix = "" if kind == "train" else f"{kind}/"
        self._status["metrics"].update((prefix + name, value) for name, value in values.items())
        if time.monotonic() >= self._next_heartbeat:
            self._heartbeat()
        if self._sinks:
            self._tell_sinks(lambda sink: sink.log(step, values, kind))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record `text`, the model's continuation of `prompt` at `step`."""
        self._append(self._samples, {"step": step, "prompt": prompt, "text": text})
        self._tell_sinks(lambda sink: sink.sample(step, prompt, text))

    def summary(self, **values: float | int | str) -> None:
        """Set final values of the run, shown and compared by `treadle runs`. A later call adds to or replaces them."""
        plain = {name: value if isinstance(value, int | str) else float(value) for name, value in values.items()}
        self._status["summary"].update(plain)
        self._heartbeat()
        self._tell_sinks(lambda sink: sink.summary(plain))

    def finish(self, state: EndState = "finished", error: str | None = None) -> None:
        """End the run and let go of its folder. A second call does nothing."""
        if not self._open:
            return
        self._heartbeat(state, error)  # before the sinks: one that uploads may be killed for its patience
        self._tell_sinks(lambda sink: sink.close(state))
        self._open = False
        self._metrics.close()
        self._samples.close()
        _detach_log(self._log_file)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.finish("interrupted")
        else:
            # To the file only: whoever catches the exception decides what the terminal shows of it.
            with (self._here / read.LOG_FILE).open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write("".join(traceback.format_exception(error)))
            self.finish("failed", "".join(traceback.format_exception_only(error)).strip())

    def _append(self, lines: LineWriter, record: Mapping[str, Any]) -> None:
        if not self._open:
            raise RunError(f"{self.folder}: this run has ended. Resume it to log more.")
        try:
            lines.write(record)
        except OSError as error:
            self._report_disk(error)

    def _heartbeat(self, state: str = "running", error: str | None = None) -> None:
        self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        self._status |= {
            "state": state,
            "updated": _now(),
            "elapsed": round(time.monotonic() - self._began, 3),
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "error": error,
        }
        try:
            write_atomically(self._here / read.STATUS_FILE, json_page(self._status))
        except OSError as failure:
            self._report_disk(failure)

    def _report_disk(self, error: OSError) -> None:
        if not self._disk_failed:
            self._disk_failed = True
            logger.warning("%s: metrics are being lost: %s", self.folder, error)

    def _start_sinks(self, sinks: Sequence["Sink"], config: Mapping[str, Any], resumed: bool) -> None:
        self._sinks = list(sinks)
        self._tell_sinks(lambda sink: sink.start(self._here, config, resumed))

    def _tell_sinks(self, tell: Callable[["Sink"], None]) -> None:
        for sink in tuple(self._sinks):
            try:
                tell(sink)
            except Exception as error:
                self._sinks.remove(sink)
                logger.warning("%s failed and gets no more of this run: %r", type(sink).__name__, error)


def _new_folder(root: Path, name: str) -> Path:
    """Make `root/<name>-<date>-<time>`, with a number appended if another run began in the same second."""
    safe = re.sub(r"[^\w.+-]+", "-", name).strip(".-") or "run"
    stem = f"{safe}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = root / (stem if number == 1 else f"{stem}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be made: {error.strerror}; choose another root") from error
    return folder


def _replace_keeping_old(path: Path, content: bytes) -> None:
    old = path.read_bytes() if path.exists() else None
    if old == content:
        return
    if old is not None:
        number = 1
        while (kept := path.with_stem(f"{path.stem}-{number}")).exists():
            number += 1
        write_atomically(kept, old)
    write_atomically(path, content)


def _attach_log(path: Path) -> logging.FileHandler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    house = logging.getLogger("treadle")
    if house.level == logging.NOTSET:  # the default would keep everything below a warning out of the file
        house.setLevel(logging.INFO)
    house.addHandler(handler)
    return handler


def _detach_log(handler: logging.FileHandler) -> None:
    logging.getLogger("treadle").removeHandler(handler)
    handler.close()


def _now() -> str:
    # In UTC, so that times sort as text, whatever zones the runs come from.
    return datetime.now(UTC).isoformat(timespec="milliseconds")
