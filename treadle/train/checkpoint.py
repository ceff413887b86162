"""Checkpoints: written in the background, visible only when whole, kept by a policy, loaded into the live state.

A checkpoint is a folder `step-00001000` of PyTorch's distributed checkpoint format plus `checkpoint.json`. It is
written under another name and renamed when complete, so a torn one is never picked up.
"""

import json
import logging
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from treadle.errors import CheckpointError
from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import LoadPlanner, SavePlanner
from treadle.tracking.files import write_atomically
from treadle.train.config import CheckpointConfig
from treadle.train.state import TrainState

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # in the run folder
FACTS_FILE = "checkpoint.json"
FORMAT = "treadle-checkpoint-1"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpointer:
    """Saves and finds the checkpoints of one run, in one folder. All processes of the mesh call it alike.

    Each writes its own part of the tensors; the leader does the rest, once all have finished. A checkpoint says nothing
    of how the run was cut, so it is loaded into any other layout.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, mesh: Mesh | None = None):
        self.folder, self.config, self.mesh = folder, config, mesh or Mesh()
        # PyTorch says so at each save and load; one process is what is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        self._pending: tuple[Future[Any], int, dict[str, Any]] | None = None

    def save(self, state: TrainState, facts: dict[str, Any], *, wait: bool = False) -> None:
        """Begin to save; with `wait`, or where saving is not asynchronous, return when it is done.

        facts: what else must come back, as JSON (the loader's state, the model's config). When a save that nobody waits
        for fails (a full disk), that is logged and the run goes on with the checkpoints it has; a waited-for failure
        raises CheckpointError. Either way nothing that was complete is lost.
        """
        self.finish()  # one at a time: each holds a copy of the state in host memory
        if self.mesh.any(self.path(state.step).exists()):
            return
        facts = {"format": FORMAT, **state.facts(), **facts}
        future = self._write(state)
        self._pending = (future, state.step, facts)
        if wait or not self.config.asynchronous:
            self.finish(strict=wait)

    def poll(self) -> None:
        """Complete a background save that has ended; call it once a step."""
        if self._pending and self.mesh.all(self._pending[0].done()):
            self.finish()

    def finish(self, *, strict: bool = False) -> None:
        """Wait for the save under way, make it visible, and drop what the policy no longer keeps."""
        if self._pending is None:
            return
        (future, step, facts), self._pending = self._pending, None
        error = _failure(future)
        if self.mesh.any(error is not None):
            error = error or RuntimeError("another process could not write its part")
        else:
            error = self.mesh.leaders(lambda: self._publish(step, facts))
        if error is not None:
            if self.mesh.leads:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            cause = _root_cause(error)
            message = f"{self.path(step)}: could not be saved: {cause}. Earlier checkpoints are untouched."
            if strict:
                raise CheckpointError(message) from error
            logger.error(message)
        elif self.mesh.leads:
            self._drop_old()

    def _publish(self, step: int, facts: dict[str, Any]) -> Exception | None:
        """Give a complete checkpoint its name; what went wrong, if anything."""
        temporary = self._temporary(step)
        try:
            write_atomically(temporary / FACTS_FILE, json.dumps(facts, indent=1).encode())
            os.replace(temporary, self.path(step))
            _sync(self.folder)  # the new name must last before older checkpoints go
        except OSError as error:
            return OSError(str(error))
        return None

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if (path / FACTS_FILE).is_file())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def facts(self, step: int) -> dict[str, Any]:
        """What was saved beside the tensors. Raises CheckpointError if it is not one of ours."""
        path = self.path(step) / FACTS_FILE
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable: {error}") from None
        found = facts.get("format") if isinstance(facts, dict) else None
        if found != FORMAT:
            raise CheckpointError(f"{path}: format is {found!r}, expected '{FORMAT}'")
        return dict(facts)

    def load(self, state: TrainState, step: int) -> None:
        """Fill the live state, in place. Raises CheckpointError naming what does not fit."""
        tensors = state.tensors()
        self.load_tensors(tensors, step)
        state.restore(tensors)
        state.restore_facts(self.facts(step))

    def load_tensors(self, tensors: dict[str, Any], step: int) -> None:
        """Fill some of a checkpoint's tensors, in place. Raises CheckpointError naming what does not fit."""
        try:
            dcp.load(
                tensors, checkpoint_id=str(self.path(step)), no_dist=not self.mesh.distributed, planner=LoadPlanner()
            )
        except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
            raise CheckpointError(f"{self.path(step)}: cannot be loaded: {_root_cause(error)}") from error

    def _temporary(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    def _write(self, state: TrainState) -> "Future[Any]":
        temporary = self._temporary(state.step)
        # A group of its own: what a save exchanges in the background must not mix with the steps that go on.
        options: dict[str, Any] = {
            "checkpoint_id": str(temporary),
            "no_dist": not self.mesh.distributed,
            "process_group": self.mesh.background,
            "planner": SavePlanner(self.mesh.device),
        }
        done: Future[Any] = Future()
        refused = self.mesh.leaders(lambda: self._begin(temporary))
        if refused is not None:
            done.set_exception(refused)
            return done
        try:
            if self.config.asynchronous:
                # Returns once the state is copied; the writing goes on in a thread.
                response = dcp.async_save(state.tensors(), **options)
                assert isinstance(response, Future)
                return response
            done.set_result(dcp.save(state.tensors(), **options))
        except (OSError, RuntimeError, CheckpointException) as error:
            done.set_exception(error)
        return done

    def _begin(self, temporary: Path) -> Exception | None:
        """Make room for a checkpoint; what went wrong, if anything."""
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return OSError(str(error))  # plain, to be told to the other processes
        return None

    def _drop_old(self) -> None:
        steps = self.steps()
        for step in steps[: -self.config.keep]:
            if self.config.keep_every is None or step % self.config.keep_every:
                (self.path(step) / FACTS_FILE).unlink(missing_ok=True)  # first: half a checkpoint must not look whole
                shutil.rmtree(self.path(step), ignore_errors=True)
        for torn in self.folder.glob(".step-*.partial"):  # of a process that was killed: ours is not under way now
            shutil.rmtree(torn, ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failure(future: "Future[Any]") -> Exception | None:
    try:
        future.result()
    except (OSError, RuntimeError, CheckpointException) as error:
        return error  # type: ignore[return-value]
    return None


def _root_cause(error: BaseException) -> str:
    """The innermost message: PyTorch wraps a full disk in several layers that each print a traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        first = next(iter(error.failures.values()))
        return _root_cause(first[0] if isinstance(first, tuple) else first)
    cause = error.__cause__ or error.__context__
    return _root_cause(cause) if cause is not None else f"{type(error).__name__}: {error}"
