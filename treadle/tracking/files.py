"""Files that survive a kill at any byte: JSON replaced as a whole, and lines of JSON that are only appended to."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# JSON has no NaN or infinity. These spellings are read back by float() in Python and Number() in JavaScript.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
TAIL_BYTES = 1 << 16
_LINE = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
_PAGE = json.JSONEncoder(allow_nan=False, ensure_ascii=False, indent=2)


def _encode(encoder: json.JSONEncoder, value: Any) -> bytes:
    try:
        text = encoder.encode(value)
    except ValueError:  # a non-finite float: rare, so only then is every value looked at
        text = encoder.encode(_spell_non_finite(value))
    # A lone surrogate cannot be UTF-8; backslashreplace writes it as the JSON escape that reads back as itself.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _spell_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _spell_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_non_finite(item) for item in value]
    return value


def restore_floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the spelled-out non-finite floats turned back into floats."""
    return {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in values.items()}


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` as a whole: a reader, or a crash, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def json_page(value: Any) -> bytes:
    """`value` as indented JSON; non-finite floats are spelled out."""
    return _encode(_PAGE, value)


class LineWriter:
    """Appends one JSON object per line; each line is one write, so a killed process tears the last line at most.

    A torn line is left as it is, and the next record starts on a line of its own.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`. Raises OSError if the disk does not take all of it."""
        line = _encode(_LINE, record)
        if self._torn:
            line = b"\n" + line
        self._torn = True  # until the whole line is written
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written: the disk is full")
        self._torn = False

    def close(self) -> None:
        os.close(self._file)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of lines, oldest first. Torn lines are skipped; a missing file has no records."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def read_last_line(path: Path) -> dict[str, Any] | None:
    """The last whole record within the last 64 KiB of a file of lines."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    return next((record for line in reversed(lines) if (record := _parse(line)) is not None), None)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # covers torn JSON and a torn UTF-8 character
        return None
    return record if isinstance(record, dict) else None
