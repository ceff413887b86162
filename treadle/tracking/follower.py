"""The run as the processes see it that do not write it."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from treadle.tracking.run import EndState, Run


class Follower(Run):
    """Knows the run's folder, and drops what it is told: the leading process records it."""

    def __init__(self, folder: Path):
        self.folder, self.id = folder, folder.absolute().name

    def accept_config(self, config_yaml: str) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def summary(self, **values: float | int | str) -> None: ...

    def finish(self, state: EndState = "finished", error: str | None = None) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __enter__(self) -> Self:
        return self
