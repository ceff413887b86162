"""One writer per run folder: an advisory lock that vanishes with its process, however that ends."""

import fcntl
import logging
import os
import time
import weakref
from pathlib import Path

from treadle.errors import RunError

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
PATIENCE_SECONDS = 0.5


class FolderLock:
    """Held from construction to `release`, or to the end of the process.

    Raises RunError, naming the folder and the holder's pid, if another process (or this one, elsewhere) holds it.
    """

    def __init__(self, folder: Path):
        path = folder / LOCK_FILE
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire(folder)
        except BaseException:
            os.close(self._file)
            raise
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        # A forked child (a data loader's worker) shares the lock; were it to outlive us, the folder would stay locked.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_in_child(reference))

    def _acquire(self, folder: Path) -> None:
        # A reader that asks whether the lock is held takes it for an instant: wait that out before giving up.
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    pid = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "unknown"
                    raise RunError(
                        f"{folder}: in use by the process with pid {pid}. "
                        "Wait for it, stop it, or write to another folder."
                    ) from None
                time.sleep(0.01)
            except OSError as error:  # some network file systems have no locks; that must not forbid training there
                return logger.warning("%s cannot be locked (%s): make sure that one process writes it", folder, error)

    def release(self) -> None:
        """Let the next writer in. May be called again."""
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _close_in_child(reference: "weakref.ref[FolderLock]") -> None:
    lock = reference()
    if lock is not None:
        lock.close()


def is_locked(folder: Path) -> bool:
    """Whether a live process writes this folder; True where the file system cannot tell."""
    try:
        file = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
