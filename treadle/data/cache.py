"""A cache of folders, each made once: whole or not there, whoever asks, whatever interrupts."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treadle.errors import DataError

log = logging.getLogger(__name__)


def key_of(*facts: Any) -> str:
    """A short name for a combination of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def build_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make(temporary folder)` if it does not exist yet.

    The temporary folder is renamed when `make` returns, so a folder under its own name is always whole. A process
    that asks for a folder which another one is making waits for it. What an interrupted one left behind is removed
    here. Raises DataError where the folder cannot be written.
    """
    with writable(folder.parent):
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return folder
        temporary = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        with writable(folder.parent):
            temporary.mkdir()
        try:
            make(temporary)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turns the system's refusal to write in a cache folder into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cache folder {folder}: cannot be written: {error.strerror}; make it writable, or set data.cache "
            f"(prepare: --cache) to another folder"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends."""
    import fcntl  # POSIX only, as PyTorch's distributed training is

    with writable(path.parent):
        opened = path.open("a")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is making %s; waiting for it", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
