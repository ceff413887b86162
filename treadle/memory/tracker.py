"""Device memory of a run while it trains: whose it is, how far the plan was off, and what was there when it ran out.

On a CPU there is nothing to track, and the callback does nothing.
"""

import logging
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle.errors import ConfigError
from treadle.memory.advice import cheapest
from treadle.memory.analytic import Setting
from treadle.memory.live import local
from treadle.memory.plan import GIB
from treadle.memory.predict import setting_of
from treadle.nn.transformer import Transformer
from treadle.parallel.mesh import Mesh
from treadle.tracking.run import Run
from treadle.train.hardware import device_name
from treadle.train.loop import Callback, Loop, StepRecord
from treadle.train.session import SessionConfig

logger = logging.getLogger(__name__)

LARGEST = 12  # allocations that a report names
SETTLED = 2  # the step after which optimizer state and compiled code are there


class TrackMemory(Callback):
    """Attributes memory at an early step, compares its peak with the plan's, and explains when memory runs out.

    `kill -USR1` to the process writes a snapshot of the allocator on demand.
    """

    def __init__(self, run: Run, setting: Callable[[], Setting | None] = lambda: None):
        """setting: of the run, as planning knows it; asked for on a GPU only. None: it has no plan."""
        self.run, self.setting = run, setting
        self.asked = False
        self.plans: Setting | None = None
        self._previous: Any = None

    def start(self, loop: Loop) -> None:
        if loop.device.type == "cuda":
            # Stacks of Python frames only, and of so many allocations: cheap enough to be on all the time.
            torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=100_000)
            self.plans = self.setting()
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "asked", True))

    def step(self, loop: Loop, record: StepRecord) -> None:
        if self.asked:
            self.asked = False
            logger.info("memory snapshot: %s", write_snapshot(self.run.folder, loop, "asked for"))
        if loop.device.type == "cuda" and record.step == SETTLED:
            self.run.log(record.step, self.measured(loop), kind="memory")

    def measured(self, loop: Loop) -> dict[str, float]:
        """GiB by category, at rest and at the peak so far, and what was planned."""
        peak = float(torch.cuda.max_memory_allocated(loop.device))
        resting = Counter[str]()
        for category, _, tensor in owned(loop):
            resting[category] += tensor.untyped_storage().nbytes()
        found = {f"{category}_gib": size / GIB for category, size in resting.items()}
        found |= {"peak_gib": peak / GIB, "rest_gib": (peak - sum(resting.values())) / GIB}
        if self.plans is not None:
            rank = 0 if loop.mesh.pipeline is None else loop.mesh.pipeline.get_local_rank()
            footprint = self.plans.ranks[rank].footprint()
            planned = footprint.total - footprint.overhead  # which lies outside of the allocator
            found |= {"planned_gib": planned / GIB, "planned_error": planned / peak - 1}
        return found

    def stop(self, loop: Loop) -> None:
        self.close()

    def close(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)
            self._previous = None

    def out_of_memory(self, loop: Loop, error: Exception) -> None:
        """Write what was there before the error goes on, with the place of it."""
        changes = [] if self.plans is None else [" ".join(found.overrides()) for found in cheapest(self.plans)]
        path = write_snapshot(self.run.folder, loop, str(error).partition("\n")[0], changes)
        error.add_note(f"What was in memory, and what to change: {path}")
        self.close()


def setting_of_run(config: SessionConfig, model: Transformer, mesh: Mesh) -> Setting | None:
    """What planning knows a run as; None on a device that it does not know."""
    try:
        known = config.model_copy(update={"model": model.config})  # with its vocabulary
        return setting_of(known, mesh.world.size, device_name(mesh.device))
    except ConfigError as error:
        logger.info("no memory plan for this run: %s", error)
        return None


def owned(loop: Loop) -> Iterator[tuple[str, str, Tensor]]:
    """What the run holds between steps: category, module, this process's tensor."""
    states = {p: state for o in loop.state.optimizers.optimizers for p, state in o.state.items()}
    for name, parameter in loop.state.model.named_parameters():
        module = name.rpartition(".")[0]
        yield "parameters", module, local(parameter.detach())
        if parameter.grad is not None:
            yield "gradients", module, local(parameter.grad)
        for value in states.get(parameter, {}).values():
            if isinstance(value, Tensor):
                yield "optimizer", module, local(value)


def write_snapshot(folder: Path, loop: Loop, why: str, changes: Sequence[str] = ()) -> Path:
    """A pickle for pytorch.org/memory_viz, and beside it a report to read, whose path is returned."""
    each = f"-rank-{loop.mesh.rank}" if loop.mesh.distributed else ""
    stem = folder / f"memory-step-{loop.state.step + 1}{each}"
    snapshot: dict[str, Any] = {"segments": []}
    if loop.device.type == "cuda":
        snapshot = torch.cuda.memory._snapshot()
        with stem.with_suffix(".pickle").open("wb") as file:
            pickle.dump(snapshot, file)
    lines = report(snapshot, list(owned(loop)), why, changes)
    path = stem.with_suffix(".txt")
    path.write_text("\n".join(lines) + "\n")
    return path


def report(
    snapshot: dict[str, Any], tensors: Sequence[tuple[str, str, Tensor]], why: str, changes: Sequence[str]
) -> list[str]:
    """What is in memory, by owner: parameters, gradients and state by module, the rest by where it was allocated."""
    names = {tensor.untyped_storage().data_ptr(): f"{category} of {module}" for category, module, tensor in tensors}
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for segment in snapshot["segments"]:
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                owner = names.get(block["address"]) or _place(block.get("frames", ()))
                sizes[owner] += block["size"]
                counts[owner] += 1
    held = sum(sizes.values())
    reserved = sum(segment["total_size"] for segment in snapshot["segments"])
    lines = [why, "", f"{held / GIB:.2f} GiB in use, {reserved / GIB:.2f} GiB reserved. The largest:"]
    lines += [f"  {size / GIB:8.3f} GiB in {counts[owner]:4}  {owner}" for owner, size in sizes.most_common(LARGEST)]
    if changes:
        lines += ["", "The cheapest changes:", *(f"  {number}. {text}" for number, text in enumerate(changes, 1))]
    return lines


def _place(frames: Sequence[dict[str, Any]]) -> str:
    """The innermost line of Treadle's that asked for a block; the innermost of all where none did."""
    for frame in frames:
        if "/treadle/" in frame["filename"]:
            where = frame["filename"].rpartition("/treadle/")[2]
            return f"{frame['name']} (treadle/{where}:{frame['line']})"
    return f"{frames[0]['name']} ({frames[0]['filename']}:{frames[0]['line']})" if frames else "unknown"
