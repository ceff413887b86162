"""Which of Treadle's operators a GPU would run, where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from treadle.kernels.operation import Operation


@contextmanager
def own_kernels() -> Iterator[None]:
    """Eagerly all of them, as for calls as large as those of training; what they keep and need is theirs to say. In
    compiled code their definitions, as ever."""
    worthwhile = Operation.worthwhile

    def on_gpu(operation: Operation, *args: Any) -> bool:
        return worthwhile(operation, *args) if torch.compiler.is_compiling() else True

    with mock.patch.object(Operation, "worthwhile", on_gpu):
        yield
