"""Start the processes of a run on this machine: what `torchrun` does, without typing it."""

import os
import signal
import sys
import uuid
from collections.abc import Sequence

from treadle.errors import TrainingError

SAVING_SECONDS = 600  # what a stop that was asked for may take, before processes are killed
TOGETHER_SECONDS = 5  # failures so close to each other have one cause


def launch(arguments: Sequence[str], processes: int) -> None:
    """`treadle` with these arguments, in so many processes. Returns when all have ended well, or were asked to stop.

    A process that dies takes the others with it. Raises SystemExit where one has said why, TrainingError otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "treadle", *arguments)
    except SignalException:
        return  # it was passed on: the processes have saved and ended
    except ChildFailedError as error:
        raise _failure(error) from None


def _failure(error: object) -> BaseException:
    """What the first process to fail has said.

    Of those that fail at about the same time a killed one comes first: the others fail because it is gone. One that is
    killed later did not end when it was told to, because of the others.
    """
    rank, first = error.get_first_failure()  # type: ignore[attr-defined]
    for other, found in error.failures.items():  # type: ignore[attr-defined]
        together = found.timestamp <= first.timestamp + TOGETHER_SECONDS
        if together and found.exitcode < 0 and found.exitcode != -signal.SIGTERM:
            rank = other
            break
    failure = error.failures[rank]  # type: ignore[attr-defined]
    if failure.exitcode > 0:  # it has printed its message, or its traceback
        print(f"rank {rank} ended first, with exit code {failure.exitcode}", file=sys.stderr)
        return SystemExit(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    return TrainingError(
        f"rank {rank} was killed by {name}; all others were stopped. Go on with: treadle train --resume latest"
    )
