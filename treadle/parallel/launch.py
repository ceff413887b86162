"""Start the processes of a run on this machine: what `torchrun` does, without typing it."""

import os
import signal
import sys
import uuid
from collections.abc import Sequence

from treadle.errors import TrainingError

SAVING_SECONDS = 600  # what a stop that was asked for may take, before processes are killed


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
    """What the first process to fail has said. A killed one comes first: the others fail because it is gone."""
    failures = error.failures  # type: ignore[attr-defined]
    killed = [rank for rank, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    rank = killed[0] if killed else error.get_first_failure()[0]  # type: ignore[attr-defined]
    failure = failures[rank]
    if failure.exitcode > 0:  # it has printed its message, or its traceback
        print(f"rank {rank} ended first, with exit code {failure.exitcode}", file=sys.stderr)
        return SystemExit(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    return TrainingError(
        f"rank {rank} was killed by {name}; all others were stopped. Go on with: treadle train --resume"
    )
