"""Measured times of kernels: one table per kind of device ships with the package, and the user's own goes before it.

`treadle kernels bench --save` writes the user's, to $XDG_CACHE_HOME/treadle/kernels/sm_90.json for a Hopper GPU.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from treadle.errors import ConfigError

SHIPPED = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Row:
    """Times of one operation at one size: its first tensor is of `dtype`, and has `rows` rows of `columns` numbers.

    floor: microseconds that its bytes take at the rate of a copy on that machine, or its FLOPs at that of a matmul.
    compiled: microseconds of its definition, compiled by PyTorch.
    """

    operation: str
    dtype: str
    rows: int
    columns: int
    floor: float
    compiled: float
    microseconds: dict[str, float]


def size(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1] if x.ndim else 1
    return x.numel() // max(1, columns), columns


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def architecture() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def nearest_row(operation: str, x: Tensor) -> Row | None:
    """The measurement that is nearest by the ratio of sizes, of the same dtype."""
    rows, columns = size(x)
    known = [row for row in load(architecture()) if row.operation == operation and row.dtype == dtype_name(x)]
    return min(known, key=lambda row: _apart(row.rows, rows) + _apart(row.columns, columns), default=None)


def _apart(a: int, b: int) -> float:
    return abs(math.log2(max(1, a) / max(1, b)))


@cache
def load(architecture: str) -> tuple[Row, ...]:
    """The user's measurements, and of the shipped ones those of operations that the user has not measured."""
    mine = read(user_table(architecture))
    measured = {row.operation for row in mine}
    return (*mine, *(row for row in read(SHIPPED / f"{architecture}.json") if row.operation not in measured))


def user_table(architecture: str) -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "treadle" / "kernels" / f"{architecture}.json"


def read(path: Path) -> tuple[Row, ...]:
    try:
        return tuple(Row(**row) for row in json.loads(path.read_text())["rows"]) if path.exists() else ()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a table of kernels ({error}); delete it, and measure again") from None


def write(path: Path, rows: Iterable[Row], about: dict[str, str]) -> None:
    """Write rows, in place of those of the same operations. about: the machine and versions they were measured with."""
    rows = tuple(rows)
    kept = [row for row in read(path) if row.operation not in {row.operation for row in rows}]
    lines = ",\n".join(json.dumps(asdict(row)) for row in sorted((*kept, *rows), key=lambda row: row.operation))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"measured on": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n')
    load.cache_clear()
