"""Several ranks on this machine, over gloo: `run(function, world, *arguments)` calls the function on each.

Ranks are forked from a process that has imported everything and run nothing, so that they start at once. When one
fails, the others are killed and its traceback is the error; no test waits for a collective that nobody will join.
"""

import io
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

SECONDS = 60.0  # for one `run`
_context: Any = None


class RankFailed(AssertionError):
    """What the first rank to fail said."""


def run(function: Callable[..., Any], world: int, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """`function(*arguments)` on each of `world` ranks, with torchrun's variables set; what each returned, by rank.

    The function is one of a module's top level, and makes its own process group (`meshed` below, `open_mesh`). What it
    takes and returns is pickled: return plain tensors, on the CPU.
    """
    context, port = _forkserver(), free_port()
    pipes, processes = [], []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, world, port, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return _collect(pipes, processes, time.monotonic() + seconds, f"{function.__name__} on {world} ranks")
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], processes: list[Any], deadline: float, what: str) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], deadline - time.monotonic())
        if not ready:
            missing = sorted(set(range(len(pipes))) - set(results))
            raise RankFailed(f"{what}: no answer from ranks {missing}")
        for pipe in pipes:
            if pipe not in ready:
                continue
            rank = pipes.index(pipe)
            try:
                ok, results[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                processes[rank].join()
                raise RankFailed(f"{what}: rank {rank} died, exit code {processes[rank].exitcode}") from None
            if not ok:
                raise RankFailed(f"{what}: rank {rank} failed\n{results[rank]}")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    try:
        answer = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    page = io.BytesIO()
    torch.save(answer, page)  # by value: a pipe would pass tensors as handles, to memory that ends with this process
    pipe.send_bytes(page.getvalue())
    pipe.close()
    os._exit(0 if answer[0] else 1)  # without waiting for a process group that others have left


@contextmanager
def meshed(device: str = "cpu", **sizes: Any) -> Iterator[Any]:
    """The mesh of a rank, of these sizes (`shard` takes what is left). Within another one it shares its processes."""
    from treadle.parallel.config import ParallelConfig
    from treadle.parallel.mesh import World, make_mesh, open_mesh

    layout = ParallelConfig(**sizes).layout(World.here().size)
    if torch.distributed.is_initialized():
        yield make_mesh(World.here(), layout, torch.device(device))
        return
    with open_mesh(layout, torch.device(device), timeout=timedelta(seconds=SECONDS).total_seconds()) as mesh:
        yield mesh


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _forkserver() -> Any:
    global _context
    if _context is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # A preload that cannot be imported is left out without a word, and each rank would import PyTorch by itself.
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(["distributed_preload"])
    return _context
